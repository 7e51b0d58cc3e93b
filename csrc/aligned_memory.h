// Memory with 64-byte alignment, so that aligned vector loads never straddle two cache lines.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace selfattn {

// Throws std::bad_alloc. Free the memory with std::free.
inline char* allocate_aligned(std::size_t bytes) {
  constexpr std::size_t alignment = 64;
  void* memory = std::aligned_alloc(alignment, (bytes / alignment + 1) * alignment);
  if (!memory) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

}  // namespace selfattn
