// The strips (rows that share registers) of a block of rows in the backward pass, and the block's scratch memory.
#pragma once
#include "kernels/dropout.h"
#include "kernels/kernel_set.h"
#include "kernels/score_tile.h"
#include "kernels/scratch.h"
#include "kernels/strip.h"
#include "simd/vec.h"

namespace selfattn::SELFATTN_ISA {

// `count` rounded up to whole vectors: the stride between rows of operands (in cells) or of sums (in elements).
template <class T>
constexpr std::int64_t padded(std::int64_t count) {
  return round_up(count, Vec<T>::width);
}

// The number of vectors of a strip, as a type.
template <int N>
struct Columns {
  static constexpr int value = N;
};

template <int N, class Use>
inline void with_columns(int vectors, Use use) {
  if constexpr (N > 1)
    if (vectors < N) return with_columns<N - 1>(vectors, use);
  use(Columns<N>());
}

// Calls use(first row, rows, Columns<vectors>()) for each strip of a block. A strip has at most `Vectors` vectors.
template <class T, int Vectors, class Use>
inline void each_strip_of(int block_rows, Use use) {
  constexpr int W = Vec<T>::width, most = Vectors * W;
  for (int first = 0; first < block_rows; first += most) {
    const int rows = block_rows - first < most ? block_rows - first : most;
    with_columns<Vectors>(ceil_div(rows, W), [&](auto columns) { use(first, rows, columns); });
  }
}

// The number of cells that hold `count` numbers.
template <class Unit>
constexpr std::int64_t cells(std::int64_t count) {
  return ceil_div(count, Unit::cell);
}

// The scratch memory of the kernel.
template <class Unit, int StripRows>
struct BackwardMemory {
  using T = typename Unit::Real;
  T* queries;         // per strip [cells of head_dim][lanes]
  T* dout;            // per strip [cells of value_dim][lanes]
  T* dquery;          // per strip [head_dim][lanes]
  T* joined_queries;  // see backward_units.h: [cells of rows][head_dim]
  T* joined_dout;     // [cells of rows][value_dim]
  T* joined_keys;     // [cells of key_block][head_dim]
  T* scores;          // [key_block][lanes] of one strip
  T* dprobs;          // [key_block][lanes] of one strip
  T* slopes;          // [key_block][lanes] of one strip: derivatives of the softcap
  T* factors;         // as dprobs, plus a few lines: see dropout_factors
  T* probs;           // [key_block][cells of block_lanes] of all strips
  T* dscores;         // [key_block][cells of block_lanes] of all strips
  T* joined_dscores;  // [cells of key_block][block_lanes]; dscores itself if a cell is one number
  T* original;        // [key_block][block_lanes]: scores before the softmax; hidden keys have -inf
  RowLimits<T> limits;
  std::int64_t block_lanes;
  std::size_t bytes;

  BackwardMemory(void* base, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
      : BackwardMemory(Carver{static_cast<char*>(base)}, rows, key_block, head_dim, value_dim) {}
  BackwardMemory(Carver carver, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
      : limits(carver, StripRows), block_lanes(padded<T>(rows)) {
    queries = carver.take<T>(block_lanes * cells<Unit>(head_dim));
    dout = carver.take<T>(block_lanes * cells<Unit>(value_dim));
    dquery = carver.take<T>(block_lanes * head_dim);
    const auto join = [&](std::int64_t count, std::int64_t width) {
      return carver.take<T>(Unit::cell > 1 ? cells<Unit>(count) * padded<T>(width) : 0);
    };
    joined_queries = join(rows, head_dim);
    joined_dout = join(rows, value_dim);
    joined_keys = join(key_block, head_dim);
    const std::int64_t tile = std::int64_t{key_block} * StripRows, wide = key_block * block_lanes;
    const std::int64_t wide_cells = cells<Unit>(key_block) * block_lanes;
    scores = carver.take<T>(tile);
    dprobs = carver.take<T>(tile);
    slopes = carver.take<T>(tile);
    factors = carver.take<T>(factor_lines(key_block) * StripRows);
    probs = carver.take<T>(wide_cells);
    dscores = carver.take<T>(wide_cells);
    joined_dscores = Unit::cell > 1 ? carver.take<T>(wide_cells) : dscores;
    original = carver.take<T>(wide);
    bytes = carver.used;
  }
  explicit BackwardMemory(const BackwardBlock& block)
      : BackwardMemory(block.scratch, block.count, block.key_block, block.head_dim, block.value_dim) {}

  // The address of the cell that holds a key and a row, in `lines` (probs or dscores) or in joined_dscores.
  T* line(T* lines, int key, int row) const { return lines + (key * block_lanes + row) / Unit::cell; }
  T* joined(int key, int row) const { return joined_dscores + key / Unit::cell * block_lanes + row; }
};

}  // namespace selfattn::SELFATTN_ISA
