// Products of matrices of cells on AMX. Up to 2 x 2 tiles of sums stay in registers over the whole depth: each step
// multiplies four pairs of tiles but loads only four tiles.
#pragma once
#include <cstdint>

#include "simd/vec.h"

namespace selfattn::SELFATTN_ISA {

constexpr int tile_rows = 16, tile_cells = 16;

// A matrix of cells. A matrix of split numbers has one plane of cells per split term.
struct CellMatrix {
  const float* data;
  std::int64_t stride;  // cells from one row to the next
  std::int64_t plane;   // cells from one split term's plane to the next
};

// Calls use<row, column>() for each of Rows x Cols tiles.
template <int Rows, int Cols, class Use>
inline void each_tile(Use use) {
  use.template operator()<0, 0>();
  if constexpr (Cols > 1) use.template operator()<0, 1>();
  if constexpr (Rows > 1) use.template operator()<1, 0>();
  if constexpr (Rows > 1 && Cols > 1) use.template operator()<1, 1>();
}

// Tile registers 0-3 hold the sums, 4 and 5 the left operand, 6 and 7 the right one. load_left<register, row>(term, k)
// loads a register with a tile of the left operand: of the split term `term`, in row `row` of tiles, starting at cell
// k. With split operands, the products of small split terms are added first. If the sums start at 0, small products are
// thus added to each other before large ones are added.
template <int SplitTerms, int Rows, int Cols, class LoadLeft>
inline void multiply_cells(LoadLeft load_left, const CellMatrix& right, std::int64_t depth) {
  for (int order = SplitTerms - 1; order >= 0; --order)
    for (int i = order; i >= 0; --i) {
      const float* b = right.data + (order - i) * right.plane;
      for (std::int64_t k = 0; k < depth; k += tile_cells, b += tile_cells * right.stride) {
        load_left.template operator()<4, 0>(i, k);
        if constexpr (Rows > 1) load_left.template operator()<5, 1>(i, k);
        load_tile<6>(b, right.stride);
        if constexpr (Cols > 1) load_tile<7>(b + VecF::width, right.stride);
        each_tile<Rows, Cols>([]<int R, int C>() { multiply_tiles<2 * R + C, 4 + R, 6 + C>(); });
      }
    }
}

template <int Rows, int Cols>
inline void clear_sums() {
  each_tile<Rows, Cols>([]<int R, int C>() { clear_tile<2 * R + C>(); });
}

template <int Rows, int Cols>
inline void load_sums(const float* sums, std::int64_t stride) {
  each_tile<Rows, Cols>(
      [&]<int R, int C>() { load_tile<2 * R + C>(sums + R * tile_rows * stride + C * VecF::width, stride); });
}

template <int Rows, int Cols>
inline void store_sums(float* sums, std::int64_t stride) {
  each_tile<Rows, Cols>(
      [&]<int R, int C>() { store_tile<2 * R + C>(sums + R * tile_rows * stride + C * VecF::width, stride); });
}

// The PeakLoop (kernel_set.h) of AMX.
inline double tile_loop(std::int64_t rounds) noexcept {
  alignas(64) float zeros[tile_rows * tile_cells] = {};
  configure_tiles();
  clear_sums<2, 2>();
  load_tile<4>(zeros, tile_cells);
  load_tile<5>(zeros, tile_cells);
  load_tile<6>(zeros, tile_cells);
  load_tile<7>(zeros, tile_cells);
  for (std::int64_t n = 0; n < rounds; ++n)
    each_tile<2, 2>([]<int R, int C>() { multiply_tiles<2 * R + C, 4 + R, 6 + C>(); });
  release_tiles();
  return 2.0 * 4 * tile_rows * 16 * 2 * tile_cells * static_cast<double>(rounds);
}

}  // namespace selfattn::SELFATTN_ISA
