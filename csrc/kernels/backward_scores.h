// The backward pass between its products, for one strip: from scores and the gradients of weights to weights and the
// gradients of scores.
#pragma once
#include "kernels/backward_strips.h"
#include "kernels/engine_fma.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"

namespace selfattn::SELFATTN_ISA {

template <class T, int Vectors>
struct BackwardScores {
  static constexpr int W = Vec<T>::width;
  using Scratch = BackwardScratch<T, Vectors * W>;

  // Turns scaled products into scores, and keeps the derivative of the softcap.
  static bool complete(const BackwardBlock& block, const Scratch& s, const ScoreTile<T>& tile, Sight sight) {
    if (tile.rows->relative) add_relative<AcrossRows>(tile, static_cast<T>(block.terms.multiplier));
    ScoreTerms terms = block.terms;
    if (terms.softcap != 0) {
      const Vec<T> cap = broadcast(static_cast<T>(terms.softcap)), one = broadcast(T(1));
      change_scores(tile, [&](Vec<T> score, int o, int l) {
        const Vec<T> bent = tanh(score);
        store(s.slopes + o * tile.step + l, one - bent * bent);
        return cap * bent;
      });
      terms.softcap = 0;  // it is applied
    }
    return complete_scores<AcrossRows>(tile, terms, sight);
  }

  static void add_dweights(const BackwardBlock& block, const Scratch& s, const ScoreTile<T>& tile) {
    const T* weights = static_cast<const T*>(block.dweights);
    const auto chunk = [&](const Row& row, int key, int n) {
      return load_up_to(weights + (&row - block.rows) * block.dweight_step + tile.first_key + key, n);
    };
    AcrossRows::each_chunk(tile, s.dprobs, chunk, [](T* cell, Vec<T> added) { store(cell, load(cell) + added); });
  }

  // Marks keys as hidden from all rows of a strip: those with the indices [from, to).
  template <int Cols>
  static void hide(const Scratch& s, const Strip& strip, int from, int to) {
    for (int key = from; key < to; ++key)
      for (int l = 0; l < Cols * W; l += W) {
        const std::int64_t cell = key * s.block_lanes + strip.first_row + l;
        store(s.probs + cell, broadcast(T(0)));
        store(s.dscores + cell, broadcast(T(0)));
        store(s.original + cell, broadcast(minus_infinity<T>));
      }
  }

  template <int Cols>
  static void keep_original(const Scratch& s, std::int64_t place, int keys) {
    for (int key = 0; key < keys; ++key)
      for (int l = 0; l < Cols * W; l += W)
        store(s.original + place + key * s.block_lanes + l, load(s.scores + key * Cols * W + l));
  }

  // probs and dscores of a strip, from its scores and dprobs. A hidden key has probability 0 and gradient 0, whatever
  // its value or the row's sums are. With dropout the weights and their gradients differ from those of the softmax by
  // `factors`; `probs` then gets the weights.
  template <int Cols>
  static void differentiate(const BackwardBlock& block, const Scratch& s, const Strip& strip, const SeenKeys& seen,
                            std::int64_t place, const T* factors) {
    const bool capped = block.terms.softcap != 0;
    if (capped || factors)
      change_cells<Cols, true>(block, s, strip.first_row, seen.count, place, factors);
    else
      change_cells<Cols, false>(block, s, strip.first_row, seen.count, place, nullptr);
    const std::int64_t first = seen.first - block.first_key;
    const Lines own{s.dscores + place, s.block_lanes}, uncapped{s.dprobs, Cols * W};
    if (block.dscores)
      keep(capped ? uncapped : own, strip, seen.count, static_cast<T*>(block.dscores) + first, block.dscore_step);
    if (block.dproducts) keep(own, strip, seen.count, static_cast<T*>(block.dproducts) + first, block.dproduct_step);
  }

 private:
  // `Some`: there is a softcap or dropout.
  template <int Cols, bool Some>
  static void change_cells(const BackwardBlock& block, const Scratch& s, std::int64_t first_row, std::int64_t keys,
                           std::int64_t place, const T* factors) {
    const Vec<T> nothing = broadcast(minus_infinity<T>), zero = broadcast(T(0));
    Vec<T> shift[Cols], factor[Cols], delta[Cols];
    for (int c = 0; c < Cols; ++c) {
      const std::int64_t row = first_row + c * W;
      shift[c] = load(static_cast<const T*>(block.shift) + row);
      factor[c] = load(static_cast<const T*>(block.factor) + row);
      delta[c] = load(static_cast<const T*>(block.delta) + row);
    }
    const bool capped = Some && block.terms.softcap != 0;
    for (std::int64_t key = 0; key < keys; ++key)
      for (int c = 0; c < Cols; ++c) {
        const std::int64_t cell = (key * Cols + c) * W, wide = place + key * s.block_lanes + c * W;
        const Vec<T> score = load(s.scores + cell);
        const Mask<T> hidden = score == nothing;
        const Vec<T> prob = select(hidden, zero, exp2(score - shift[c]) * factor[c]);
        Vec<T> weight = prob, dprob = load(s.dprobs + cell);
        if (Some && factors) {
          weight = weight * load(factors + cell);
          dprob = dprob * load(factors + cell);
        }
        Vec<T> dscore = select(hidden, zero, prob * (dprob - delta[c]));
        store(s.probs + wide, weight);
        if (capped) {
          store(s.dprobs + cell, dscore);  // before the softcap
          dscore = select(hidden, zero, dscore * load(s.slopes + cell));
        }
        store(s.dscores + wide, dscore);
      }
  }

  // Numbers of the rows of a strip, [key][row].
  struct Lines {
    const T* numbers;
    std::int64_t step;
  };

  // Stores them row by row.
  static void keep(const Lines& lines, const Strip& strip, std::int64_t keys, T* rows, std::int64_t step) {
    columns_to_rows<T>(
        strip.rows, keys, [&](int row) { return rows + (strip.first_row + row) * step; },
        [&](std::int64_t key, int row) { return load(lines.numbers + key * lines.step + row); });
  }
};

}  // namespace selfattn::SELFATTN_ISA
