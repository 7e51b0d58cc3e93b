// The operations of tiles_amx.h in AVX-512, with the same order of sums: for tests on machines without AMX.
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

// What the processor answers with a signal when tiles are used outside configure_tiles and release_tiles.
inline void need_tiles() {
  if (!tiles.configured) __builtin_trap();
}

template <int Tile>
inline void clear_tile() {
  need_tiles();
  for (VecF& row : tiles.row[Tile]) row = broadcast(0.0f);
}

template <int Tile>
inline void load_tile(const float* p, std::int64_t step) {
  need_tiles();
  for (VecF& row : tiles.row[Tile]) {
    row = load(p);
    p += step;
  }
}

template <int Tile>
inline void store_tile(float* p, std::int64_t step) {
  need_tiles();
  for (const VecF& row : tiles.row[Tile]) {
    store(p, row);
    p += step;
  }
}

template <int Sums, int Left, int Right>
inline void multiply_tiles() {
  need_tiles();
  for (int m = 0; m < 16; ++m) {
    float left[16];
    store(left, tiles.row[Left][m]);
    VecF first = broadcast(0.0f), second = broadcast(0.0f);
    for (int k = 0; k < 16; ++k) {
      const VecF cells = broadcast(left[k]);
      first = fma(first_of(cells), first_of(tiles.row[Right][k]), first);
      second = fma(second_of(cells), second_of(tiles.row[Right][k]), second);
    }
    tiles.row[Sums][m] = tiles.row[Sums][m] + (first + second);
  }
}

}  // namespace selfattn::SELFATTN_ISA
