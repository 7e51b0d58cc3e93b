// Prefetches memory that is needed soon.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"

namespace selfattn::SELFATTN_ISA {

constexpr std::int64_t cache_line = 64;

// Prefetches a cache line into L1. L2 would not do: a load that crosses the boundary between two lines is fast only if
// both are in L1. GCC removes calls of functions that only prefetch, unless it inlines them first.
[[gnu::always_inline]] inline void fetch_line(const void* p) { __builtin_prefetch(p, 0, 3); }

template <class E>
inline void fetch_lines(const E* row, std::int64_t width) {
  for (std::int64_t i = 0; i < width; i += cache_line / static_cast<std::int64_t>(sizeof(E))) fetch_line(row + i);
}

// Prefetches `width` elements into L2.
template <class T>
inline void fetch(const T* row, std::int64_t width) {
  for (std::int64_t i = 0; i < width; i += cache_line / static_cast<std::int64_t>(sizeof(T)))
    __builtin_prefetch(row + i, 0, 2);
}

// Rows to prefetch between the tiles of a product, so that they arrive while the product is computed.
template <class T>
struct Ahead {
  const T* rows;  // null: nothing to prefetch
  std::int64_t step;
  std::int64_t width;

  void fetch(std::int64_t from, std::int64_t to) const {
    if (!rows) return;
    for (std::int64_t r = from; r < to; ++r) selfattn::SELFATTN_ISA::fetch(rows + r * step, width);
  }
};

// Reads one byte of each cache line in address order, which suits hardware prefetchers. Called before code that reads
// the memory in another order.
inline void touch(const char* memory, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += cache_line)
    static_cast<void>(*static_cast<const volatile char*>(memory + i));
}

// Touches the rows' biases for the keys [first, end), row by row. Strips then read these biases column by column.
inline void touch_biases(const Row* rows, int count, std::int64_t step, std::int64_t first, std::int64_t end) {
  if (step > cache_line || step < -cache_line) return;  // most lines between two biases of a row belong to other rows
  for (int r = 0; r < count; ++r) {
    const std::int64_t last = rows[r].key_end < end ? rows[r].key_end : end;
    if (first < last && (r == 0 || rows[r].bias != rows[r - 1].bias))
      touch(rows[r].bias + first * step, (last - first - 1) * step + 1);  // up to the last key
  }
}

}  // namespace selfattn::SELFATTN_ISA
