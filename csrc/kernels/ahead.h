// Prefetches memory that is needed soon.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"
#include "kernels/tile_matmul.h"

namespace selfattn::SELFATTN_ISA {

constexpr std::int64_t cache_line = 64;

// Prefetches a cache line from memory into L2. A miss of L1 occupies one of few buffers until the line arrives: with
// prefetches from DRAM straight into L1, a Zen 4 core reads half as fast. GCC removes calls of functions that only
// prefetch, unless it inlines them first.
[[gnu::always_inline]] inline void fetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// Prefetches two cache lines: one that is needed later into L2, and one that is needed soon from L2 into L1. A load
// that crosses the boundary between two lines is fast only if both are in L1.
[[gnu::always_inline]] inline void fetch_ahead(const void* later, const void* soon) {
  fetch_line(later);
  __builtin_prefetch(soon, 0, 3);
}

template <class E>
inline void fetch_lines(const E* row, std::int64_t width) {
  for (std::int64_t i = 0; i < width; i += cache_line / static_cast<std::int64_t>(sizeof(E))) fetch_line(row + i);
}

// Prefetches rows into L2 while a product is computed, a few lines at a time. Many prefetches at once would occupy the
// buffers for outstanding misses, and the product's own loads would wait for a free buffer.
class Ahead {
 public:
  static constexpr std::int64_t interval = 32;

  // For a product of `tiles` tiles.
  Ahead(const LaterRows& rows, std::int64_t tiles, std::int64_t depth)
      : row_(rows.rows),
        end_(rows.rows + rows.count),
        bytes_(rows.bytes),
        lines_(ceil_div(rows.count * ceil_div(rows.bytes, cache_line), tiles * ceil_div(depth, interval))) {}

  void fetch() {
    for (std::int64_t i = 0; i < lines_ && row_ != end_; ++i) {
      __builtin_prefetch(static_cast<const char*>(*row_) + offset_, 0, 2);
      offset_ += cache_line;
      if (offset_ < bytes_) continue;
      offset_ = 0;
      ++row_;
    }
  }

 private:
  const void* const* row_;
  const void* const* end_;
  std::int64_t bytes_;
  std::int64_t offset_ = 0;
  std::int64_t lines_;  // per fetch
};

// Calls product(fetches), where `fetches` prefetches the rows if there are any.
template <class Product>
[[gnu::always_inline]] inline void fetch_during(const LaterRows& rows, std::int64_t tiles, std::int64_t depth,
                                                Product product) {
  if (rows.count > 0 && tiles > 0 && depth > 0)
    product(Ahead(rows, tiles, depth));
  else
    product(NoFetches());
}

// Reads one byte of each cache line in address order, which suits hardware prefetchers. Called before code that reads
// the memory in another order.
inline void touch(const char* memory, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += cache_line)
    static_cast<void>(*static_cast<const volatile char*>(memory + i));
}

// Touches the rows' biases for the keys [first, end), row by row. Strips then read these biases column by column.
inline void touch_biases(const Row* rows, int count, std::int64_t stride, std::int64_t first, std::int64_t end) {
  if (stride > cache_line || stride < -cache_line)
    return;  // most lines between two biases of a row belong to other rows
  for (int r = 0; r < count; ++r) {
    const std::int64_t last = rows[r].key_end < end ? rows[r].key_end : end;
    if (first < last && (r == 0 || rows[r].bias != rows[r - 1].bias))
      touch(rows[r].bias + first * stride, (last - first - 1) * stride + 1);  // up to the last key
  }
}

}  // namespace selfattn::SELFATTN_ISA
