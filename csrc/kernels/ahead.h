// Memory that is needed soon.
#pragma once
#include <cstdint>

namespace selfattn::SELFATTN_ISA {

constexpr std::int64_t cache_line = 64;

// Asks for `width` elements.
template <class T>
inline void fetch(const T* row, std::int64_t width) {
  for (std::int64_t i = 0; i < width; i += cache_line / static_cast<std::int64_t>(sizeof(T)))
    __builtin_prefetch(row + i, 0, 2);
}

// Rows asked for between the tiles of a product arrive while it computes.
template <class T>
struct Ahead {
  const T* rows;  // or null: nothing to ask for
  std::int64_t step;
  std::int64_t width;

  void fetch(std::int64_t from, std::int64_t to) const {
    if (!rows) return;
    for (std::int64_t r = from; r < to; ++r) selfattn::SELFATTN_ISA::fetch(rows + r * step, width);
  }
};

// Reads memory from end to end, as hardware prefetchers like it, before they are needed crosswise.
inline void touch(const char* memory, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += cache_line)
    static_cast<void>(*static_cast<const volatile char*>(memory + i));
}

}  // namespace selfattn::SELFATTN_ISA
