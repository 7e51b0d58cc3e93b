// Error messages: "attention: k has head_dim 64 but q has 128".
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace selfattn {

template <class... Parts>
[[noreturn]] void refuse(const char* function, const Parts&... parts) {
  std::ostringstream text;
  text << function << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string to_text(const std::int64_t* extents, int count) {
  std::ostringstream text;
  text << '(';
  for (int i = 0; i < count; ++i) text << (i ? ", " : "") << extents[i];
  text << (count == 1 ? ",)" : ")");
  return text.str();
}
inline std::string shape_text(const TensorView& view) { return to_text(view.shape, view.ndim); }

}  // namespace selfattn
