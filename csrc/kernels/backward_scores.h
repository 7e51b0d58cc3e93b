// The steps between the products of the backward pass, for one strip. They turn scaled products and gradients of
// weights into weights and gradients of scores.
#pragma once
#include "kernels/backward_strips.h"
#include "kernels/engine_fma.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"

namespace selfattn::SELFATTN_ISA {

template <class Unit, int Vectors>
struct BackwardScores {
  using T = typename Unit::Real;
  static constexpr int W = Vec<T>::width, cell = Unit::cell;
  using Memory = BackwardMemory<Unit, Vectors * W>;

  // Turns scaled products into scores, and keeps the derivative of the softcap. Returns whether mask or bias may hide
  // any key.
  static bool complete(const BackwardBlock& block, const Memory& s, const ScoreTile<T>& tile, Sight sight) {
    if (tile.rows->relative) add_relative<AcrossRows>(tile, static_cast<T>(block.scoring.multiplier));
    Scoring scoring = block.scoring;
    if (scoring.softcap != 0) {
      const Vec<T> cap = broadcast(static_cast<T>(scoring.softcap)), one = broadcast(T(1));
      change_scores(tile, [&](Vec<T> score, int o, int l) {
        const Vec<T> bent = tanh(score);
        store(s.slopes + o * tile.stride + l, one - bent * bent);
        return cap * bent;
      });
      scoring.softcap = 0;  // already applied
    }
    return complete_scores<AcrossRows>(tile, scoring, sight);
  }

  static void add_dweights(const BackwardBlock& block, const Memory& s, const ScoreTile<T>& tile) {
    const T* weights = static_cast<const T*>(block.dweights);
    const auto vector = [&](const Row& row, int key, int n) {
      return load_up_to(weights + (&row - block.rows) * block.dweight_stride + tile.first_key + key, n);
    };
    AcrossRows::each_vector(tile, s.dprobs, vector, [](T* dprob, Vec<T> added) { store(dprob, load(dprob) + added); });
  }

  // Marks the keys with the indices [from, to) as hidden from all rows of a strip.
  template <int Cols>
  static void hide(const Memory& s, const Strip& strip, int from, int to) {
    constexpr int line_cells = Cols * W / cell;
    const Vec<T> zero = broadcast(T(0));
    for (int key = from; key < to; ++key) {
      for (int l = 0; l < line_cells; l += W) {
        store_up_to(s.line(s.probs, key, strip.first_row) + l, zero, line_cells - l);
        store_up_to(s.line(s.dscores, key, strip.first_row) + l, zero, line_cells - l);
      }
      for (int l = 0; l < Cols * W; l += W)
        store(s.original + key * s.block_lanes + strip.first_row + l, broadcast(minus_infinity<T>));
    }
  }

  template <int Cols>
  static void keep_original(const Memory& s, std::int64_t offset, int keys) {
    for (int key = 0; key < keys; ++key)
      for (int l = 0; l < Cols * W; l += W)
        store(s.original + offset + key * s.block_lanes + l, load(s.scores + key * Cols * W + l));
  }

  // Computes probs and dscores of a strip from its scores and dprobs. In probs and dscores, the strip's first key has
  // the index `before`. A hidden key gets probability 0 and gradient 0, even if its value, or the row's factor or
  // delta, is not finite. With dropout, probs and dprobs are multiplied by `factors`, so that s.probs holds the weights
  // after dropout.
  template <int Cols>
  static void differentiate(const BackwardBlock& block, const Memory& s, const Strip& strip, const SeenKeys& seen,
                            int before, const T* factors) {
    if (block.scoring.softcap != 0 || factors || block.dscores)
      change_cells<Cols, true>(block, s, strip, {before, seen.count}, factors);
    else
      change_cells<Cols, false>(block, s, strip, {before, seen.count}, nullptr);
    const std::int64_t first = seen.first - block.first_key;
    if (block.dscores)
      keep({s.dprobs, Cols * W}, strip, seen.count, static_cast<T*>(block.dscores) + first, block.dscore_stride);
    if (cell == 1 && block.dproducts)
      keep({s.line(s.dscores, before, strip.first_row), s.block_lanes}, strip, seen.count,
           static_cast<T*>(block.dproducts) + first, block.dproduct_stride);
  }

 private:
  struct KeyIndices {
    int first, count;
  };

  // `Some`: there is a softcap or dropout, or the caller wants the gradients of scores. Then the gradients of scores
  // overwrite dprobs.
  template <int Cols, bool Some>
  static void change_cells(const BackwardBlock& block, const Memory& s, const Strip& strip, KeyIndices keys,
                           const T* factors) {
    const Vec<T> nothing = broadcast(minus_infinity<T>), zero = broadcast(T(0));
    Vec<T> shift[Cols], factor[Cols], delta[Cols];
    Mask<T> absent[Cols];  // lanes without a row; such a lane may share a cell with a row
    for (int c = 0; c < Cols; ++c) {
      const int row = strip.first_row + c * W;
      absent[c] = broadcast(static_cast<T>(strip.rows - c * W)) <= iota(T());
      shift[c] = load(static_cast<const T*>(block.shift) + row);
      factor[c] = load(static_cast<const T*>(block.factor) + row);
      delta[c] = load(static_cast<const T*>(block.delta) + row);
    }
    const bool capped = Some && block.scoring.softcap != 0;
    for (int key = 0; key < keys.count; key += cell)
      for (int c = 0; c < Cols; ++c) {
        Vec<T> weight[cell], dscore[cell];
        for (int i = 0; i < cell; ++i) {
          weight[i] = dscore[i] = zero;
          if (key + i >= keys.count) continue;
          const int offset = ((key + i) * Cols + c) * W;
          const Vec<T> score = load(s.scores + offset);
          const Mask<T> hidden = (score == nothing) | absent[c];
          const Vec<T> prob = select(hidden, zero, exp2(score - shift[c]) * factor[c]);
          Vec<T> dprob = load(s.dprobs + offset);
          weight[i] = prob;
          if (Some && factors) {
            weight[i] = prob * load(factors + offset);
            dprob = dprob * load(factors + offset);
          }
          dscore[i] = select(hidden, zero, prob * (dprob - delta[c]));
          if (Some) store(s.dprobs + offset, dscore[i]);  // the gradient of the score after the softcap
          if (capped) dscore[i] = select(hidden, zero, dscore[i] * load(s.slopes + offset));
        }
        const int index = keys.first + key, row = strip.first_row + c * W;
        Unit::keep_lines(weight, s.line(s.probs, index, row), s.block_lanes / cell);
        Unit::keep_lines(dscore, s.line(s.dscores, index, row), s.block_lanes / cell);
        Unit::keep_joined(dscore, s.joined(index, row));
      }
  }

  // Numbers of the rows of a strip, [key][row].
  struct Lines {
    const T* numbers;
    std::int64_t stride;
  };

  // Stores `lines` row by row.
  static void keep(const Lines& lines, const Strip& strip, std::int64_t keys, T* rows, std::int64_t stride) {
    columns_to_rows<T>(
        strip.rows, keys, [&](int row) { return rows + (strip.first_row + row) * stride; },
        [&](std::int64_t key, int row) { return load(lines.numbers + key * lines.stride + row); });
  }
};

}  // namespace selfattn::SELFATTN_ISA
