// Memory for the time of a call, kept for the next one: at most 128 MiB in all. Safe to use from many threads and after
// fork: no locks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

#include "arithmetic.h"

namespace selfattn {

// Bytes of a buffer of so many elements; a product that overflows is memory that nobody has.
template <class... Sizes>
std::int64_t bytes_of(Sizes... sizes) {
  std::int64_t bytes = 1;
  for (const std::int64_t size : {static_cast<std::int64_t>(sizes)...})
    if (__builtin_mul_overflow(bytes, size, &bytes)) throw std::bad_alloc();
  if (bytes > std::int64_t{1} << 60) throw std::bad_alloc();
  return static_cast<std::int64_t>(whole_lines(static_cast<std::size_t>(bytes)));
}

// At least `bytes` bytes on a 64-byte boundary. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  unsigned class_ = 0;  // of the block's size
};

}  // namespace selfattn
