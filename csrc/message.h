// Errors in a caller's arguments: "attention: k has head_dim 64 but q has 128".
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tensor_view.h"

namespace selfattn {

// The name of an argument in a message: Argument{name}, or "k"_arg.
struct Argument {
  const char* name;
};
constexpr Argument operator""_arg(const char* name, std::size_t) { return {name}; }

// A message as alternating names and texts, so that a caller can replace the names with those of its own arguments:
// {"attention", ": ", "k", " has head_dim 64 but ", "q", " has 128"}. The first name is the function's.
using Message = std::vector<std::string>;

inline void extend(Message& message, Argument argument) {
  message.emplace_back(argument.name);
  message.emplace_back();  // the text after the name
}

template <class Text>
void extend(Message& message, const Text& part) {
  std::ostringstream text;
  text.exceptions(std::ios_base::badbit);  // if memory runs out, throws bad_alloc instead of cutting the message off
  text << part;
  message.back() += text.str();
}

// A wrong value: Python's ValueError.
class Refusal : public std::invalid_argument {
 public:
  explicit Refusal(Message message)
      : std::invalid_argument(std::accumulate(message.begin(), message.end(), std::string())),
        message_(std::make_shared<const Message>(std::move(message))) {}
  const Message& message() const { return *message_; }

 private:
  std::shared_ptr<const Message> message_;  // shared, because copying an exception must not throw
};

// A wrong type: Python's TypeError.
class TypeRefusal : public Refusal {
 public:
  using Refusal::Refusal;
};

// A memory of fixed size, such as a page pool, has too little room: Python's MemoryError.
class MemoryRefusal : public Refusal {
 public:
  using Refusal::Refusal;
};

template <class Error = Refusal, class... Parts>
[[noreturn]] void refuse(const char* function, const Parts&... parts) {
  Message message{function, ": "};
  (extend(message, parts), ...);
  throw Error(std::move(message));
}

inline std::string to_text(const std::int64_t* extents, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(extents[i]);
  return text + (count == 1 ? ",)" : ")");
}
inline std::string shape_text(const TensorView& view) { return to_text(view.shape, view.ndim); }

}  // namespace selfattn
