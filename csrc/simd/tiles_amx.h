// AMX: eight tiles, each of 16 rows of 64 bytes. Instructions encode the numbers of tiles, so these are template
// arguments.
#pragma once
#if !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
#error "tiles_amx.h needs AMX-TILE and AMX-BF16"
#endif
#include <cstdint>

namespace selfattn::SELFATTN_ISA {

// Configures all tiles at full size. The thread may use them until it calls release_tiles.
inline void configure_tiles() {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } layout;
  asm volatile("ldtilecfg %0" : : "m"(layout));
}

inline void release_tiles() { asm volatile("tilerelease"); }

template <int Tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

// `stride`: floats (or cells of two bfloat16) from one row to the next.
template <int Tile>
inline void load_tile(const float* p, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride * 4), "i"(Tile) : "memory");
}

template <int Tile>
inline void store_tile(float* p, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride * 4), "i"(Tile) : "memory");
}

// Sums[m][n] += sum over k of dot(Left[m][k], Right[k][n]), where dot is the dot product of two cells.
template <int Sums, int Left, int Right>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Left), "i"(Right));
}

}  // namespace selfattn::SELFATTN_ISA
