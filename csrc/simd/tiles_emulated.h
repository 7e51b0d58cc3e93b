// The operations of tiles_amx.h in AVX-512, with the same order of additions, for tests on machines without AMX.
#pragma once
#include "simd/vec_avx512_bf16.h"

namespace selfattn::SELFATTN_ISA {

struct Tiles {
  VecF row[8][16];
  bool configured;
};
inline thread_local Tiles tiles;

inline void configure_tiles() { tiles.configured = true; }
inline void release_tiles() { tiles.configured = false; }

// Traps, as a processor does, if tiles are used before configure_tiles or after release_tiles.
inline void need_tiles() {
  if (!tiles.configured) __builtin_trap();
}

template <int Tile>
inline void clear_tile() {
  need_tiles();
  for (VecF& row : tiles.row[Tile]) row = broadcast(0.0f);
}

template <int Tile>
inline void load_tile(const float* p, std::int64_t stride) {
  need_tiles();
  for (VecF& row : tiles.row[Tile]) {
    row = load(p);
    p += stride;
  }
}

template <int Tile>
inline void store_tile(float* p, std::int64_t stride) {
  need_tiles();
  for (const VecF& row : tiles.row[Tile]) {
    store(p, row);
    p += stride;
  }
}

// AMX flushes subnormal numbers to 0, both in operands and in sums.
inline VecF flushed(VecF x) { return select(abs(x) < broadcast(0x1p-126f), copy_sign(broadcast(0.0f), x), x); }

template <int Sums, int Left, int Right>
inline void multiply_tiles() {
  need_tiles();
  for (int m = 0; m < 16; ++m) {
    float left[16];
    store(left, tiles.row[Left][m]);
    VecF first = broadcast(0.0f), second = broadcast(0.0f);
    for (int k = 0; k < 16; ++k) {
      const VecF a = broadcast(left[k]), b = tiles.row[Right][k];
      first = flushed(fma(flushed(first_of(a)), flushed(first_of(b)), first));
      second = flushed(fma(flushed(second_of(a)), flushed(second_of(b)), second));
    }
    tiles.row[Sums][m] = flushed(flushed(tiles.row[Sums][m]) + flushed(first + second));
  }
}

}  // namespace selfattn::SELFATTN_ISA
