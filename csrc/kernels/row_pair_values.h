// The row kernel's sums of values with dot products of bfloat16 pairs: two keys at a time. Weights are rounded to
// bfloat16, values are bfloat16 already.
#pragma once
#include "kernels/row_values.h"

namespace selfattn::SELFATTN_ISA {

// MaxSums: as for FmaValues.
template <int MaxSums>
struct PairValues {
  static constexpr int W = VecF::width;
  static constexpr int wide = 2 * W;  // dims of a vector of values; their sums take two vectors
  static constexpr int max_rows_at_once = 4;

  // out = out * rescale + probs . values. Overwrites the probs with their pairs.
  template <class Scratch>
  static void accumulate(const RowBlock& block, const Scratch& s, const KeyBlock& keys) {
    for (int first = 0; first < keys.count; first += chunk_keys) {
      const ValueChunk chunk(keys, first);
      for (int r = 0; r < block.count; ++r) pair_weights(s, chunk, r);
      accumulate_rows<max_rows_at_once>(block, s, chunk, 0);
    }
  }

  // Computes the same sums in the same order, with 0 for the values of hidden keys.
  template <class Scratch>
  static void accumulate_visible(const RowBlock& block, const Scratch& s, const ScoreTile<float>& tile,
                                 const KeyBlock& keys) {
    for (int first = 0; first < keys.count; first += chunk_keys) {
      const ValueChunk chunk(keys, first);
      for (int r = 0; r < block.count; ++r) {
        pair_weights(s, chunk, r);
        for (std::int64_t dim = 0; dim < block.value_dim; dim += wide)
          sweep<1, 1>(block, s, chunk, r, dim, [&](const BFloat* value, int j) {
            return load_cells(value, sees(tile, r, first + j) ? block.value_dim - dim : 0);
          });
      }
    }
  }

 private:
  static_assert(chunk_keys == wide);

  template <class Scratch>
  static float* weights_of(const Scratch& s, const ValueChunk& chunk, int row) {
    return s.scores + row * s.score_step + chunk.first_key;
  }

  template <class Scratch>
  static void pair_weights(const Scratch& s, const ValueChunk& chunk, int row) {
    float* weights = weights_of(s, chunk, row);
    store(weights, to_cells_in_order(load(weights), chunk.count > W ? load(weights + W) : broadcast(0.0f)));
  }

  template <int Rows, class Scratch>
  static void accumulate_rows(const RowBlock& block, const Scratch& s, const ValueChunk& chunk, int row) {
    for (; row + Rows <= block.count; row += Rows) accumulate_dims<Rows, MaxSums / Rows / 2>(block, s, chunk, row, 0);
    if constexpr (Rows > 1)
      if (row < block.count) accumulate_rows<Rows / 2>(block, s, chunk, row);
  }

  // Processes `Cols` vectors of values at a time. For the remaining dims, `Cols` is halved.
  template <int Rows, int Cols, class Scratch>
  static void accumulate_dims(const RowBlock& block, const Scratch& s, const ValueChunk& chunk, int row,
                              std::int64_t dim) {
    for (; block.value_dim - dim >= Cols * wide; dim += Cols * wide)
      sweep<Rows, Cols>(block, s, chunk, row, dim, [](const BFloat* value, int) { return load_cells(value, wide); });
    if constexpr (Cols > 1) {
      if (dim < block.value_dim) accumulate_dims<Rows, Cols / 2>(block, s, chunk, row, dim);
    } else if (dim < block.value_dim) {
      const std::int64_t tail = block.value_dim - dim;
      sweep<Rows, 1>(block, s, chunk, row, dim, [tail](const BFloat* value, int) { return load_cells(value, tail); });
    }
  }

  // load_value(p, j) loads values of key j. The last key of an odd number is paired with itself: its second weight is
  // that of a lane beyond the end, 0.
  template <int Rows, int Cols, class Scratch, class LoadValue>
  static void sweep(const RowBlock& block, const Scratch& s, const ValueChunk& chunk, int row, std::int64_t dim,
                    LoadValue load_value) {
    VecF sums[Rows][2 * Cols];
    for (auto& line : sums)
      for (VecF& sum : line) sum = broadcast(0.0f);
    const float* weights[Rows];
    for (int r = 0; r < Rows; ++r) weights[r] = weights_of(s, chunk, row + r);
    const bool asks = row + Rows == block.count;
    for (int j = 0; j < chunk.count; j += 2) {
      const int next = j + 1 < chunk.count ? j + 1 : j;
      const BFloat* first = row_of<BFloat>(chunk.values, j) + dim;
      const BFloat* second = row_of<BFloat>(chunk.values, next) + dim;
      VecF weight[Rows];
      for (int r = 0; r < Rows; ++r) weight[r] = in_register(broadcast(*weights[r]++));
      for (int c = 0; c < Cols; ++c) {
        if (asks)
          for (int i = 0; i < 2; ++i) fetch_line(row_of<BFloat>(chunk.values, j + i + chunk_keys) + dim + c * wide);
        VecF cells[2];
        zip(in_register(load_value(first + c * wide, j)), in_register(load_value(second + c * wide, next)), cells);
        for (int r = 0; r < Rows; ++r)
          for (int i = 0; i < 2; ++i) sums[r][2 * c + i] = add_products(weight[r], cells[i], sums[r][2 * c + i]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < 2 * Cols; ++c)
        if (dim + c * W < block.value_dim)
          add_sum(s, chunk, row + r, dim + c * W,
                  recompute_small(chunk, weights_of(s, chunk, row + r), dim + c * W, block.value_dim, sums[r][c]));
  }

  // Products of pairs take subnormal numbers for 0. This matters only where a sum is tiny: there it is computed by FMA.
  // The choice is made for each lane, so that no sum depends on its neighbours.
  static VecF recompute_small(const ValueChunk& chunk, const float* weights, std::int64_t dim, std::int64_t value_dim,
                              VecF sum) {
    const MaskF small =
        (abs(sum) < broadcast(0x1p-100f)) & (iota(0.0f) < broadcast(static_cast<float>(value_dim - dim)));
    if (!any(small) || all(load(weights) == broadcast(0.0f))) return sum;
    VecF exact = broadcast(0.0f);
    for (int j = 0; j < chunk.count; ++j) {
      const float factor = widen(BFloat{static_cast<std::uint16_t>(bits_of(weights[j / 2]) >> j % 2 * 16)});
      if (factor == 0) continue;  // hidden keys among others
      exact = fma(broadcast(factor), load_up_to(row_of<BFloat>(chunk.values, j) + dim, value_dim - dim), exact);
    }
    return select(small, exact, sum);
  }
};

}  // namespace selfattn::SELFATTN_ISA
