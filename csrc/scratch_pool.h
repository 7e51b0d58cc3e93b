// Memory for the duration of a call or of an AttentionState. Up to 128 MiB in total is kept for later calls. Uses no
// locks, so it is safe with many threads and after fork.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

#include "arithmetic.h"

namespace selfattn {

// The product of all sizes, rounded up to whole cache lines. Throws std::bad_alloc if it overflows or exceeds 2^60.
template <class... Sizes>
std::int64_t bytes_of(Sizes... sizes) {
  std::int64_t bytes = 1;
  for (const std::int64_t size : {static_cast<std::int64_t>(sizes)...})
    if (__builtin_mul_overflow(bytes, size, &bytes)) throw std::bad_alloc();
  if (bytes > std::int64_t{1} << 60) throw std::bad_alloc();
  return static_cast<std::int64_t>(whole_lines(static_cast<std::size_t>(bytes)));
}

// At least `bytes` bytes with 64-byte alignment. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  unsigned class_ = 0;  // size class of the buffer
};

// Scratch memory of the same size for each thread.
class ThreadScratch {
 public:
  ThreadScratch(std::size_t bytes, int threads) : bytes_(bytes), memory_(bytes * static_cast<std::size_t>(threads)) {}
  char* of(int thread) const { return memory_.data() + bytes_ * static_cast<std::size_t>(thread); }

 private:
  const std::size_t bytes_;
  const Scratch memory_;
};

}  // namespace selfattn
