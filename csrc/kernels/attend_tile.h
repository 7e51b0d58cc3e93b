// Attention for many query rows: vectors run across rows.
//
//   scores[key][row] = key . query         queries packed once per block
//   online softmax down the keys           maxima and sums are vertical: no shuffles
//   out[dim][row] += value[dim] * probs[key][row]
//
// An engine computes the products (engine_fma.h defines the interface). A block of rows consists of strips. A strip has
// at most as many rows as `Vectors` registers have lanes. Each strip skips the keys before the first and after the last
// key that its rows can see. So at a causal or window limit, the scores of some hidden keys are computed. Their number
// per row is at most the number of rows of a strip, and half of it on average. An engine with an `alignment` may add a
// few hidden keys.
#pragma once
#include "kernels/ahead.h"
#include "kernels/dropout.h"
#include "kernels/engine_fma.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/softmax.h"
#include "kernels/strip.h"

namespace selfattn::SELFATTN_ISA {

template <class Engine, int Vectors>
struct TileAttention {
  using T = typename Engine::Real;
  using Block = typename Engine::Block;
  static constexpr int W = Vec<T>::width;
  static constexpr int strip_rows = Vectors * W;

  struct Memory {
    Strip* strips;
    T* queries;  // per strip, packed by the engine
    T* out;      // per strip [value_dim][lanes]
    T* scores;   // [key_block][lanes]; some engines store probs here
    T* terms;    // [key_block][lanes]; the factors of dropout, or mask and bias
    RowLimits<T> limits;
    typename Engine::Memory memory;
    std::size_t bytes;

    Memory(void* base, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : Memory(Carver{static_cast<char*>(base)}, rows, key_block, head_dim, value_dim) {}
    Memory(Carver carver, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : limits(carver, strip_rows), memory(carver, key_block, head_dim, value_dim) {
      const std::int64_t lanes = round_up(rows, W);  // of all strips
      strips = carver.take<Strip>(strips_of(rows));
      queries = carver.take<T>(lanes * Engine::query_cells(head_dim));
      out = carver.take<T>(lanes * Engine::dim_rows(value_dim));
      scores = carver.take<T>(Engine::key_rows(key_block) * strip_rows);
      terms = carver.take<T>(factor_lines(key_block) * strip_rows);
      bytes = carver.used;
    }
    explicit Memory(const RowBlock& block)
        : Memory(block.scratch, block.count, block.key_block, block.head_dim, block.value_dim) {}
  };

  static constexpr int strips_of(int rows) { return ceil_div(rows, strip_rows); }

  static std::size_t scratch_bytes(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim) {
    return Memory(nullptr, rows, key_block, head_dim, value_dim).bytes;
  }

  static void begin(const RowBlock& block) noexcept {
    const Memory s(block);
    T* row_max = static_cast<T*>(block.row_max);
    T* row_sum = static_cast<T*>(block.row_sum);
    for (int first = 0, i = 0, strips = strips_of(block.count); i < strips; first += s.strips[i++].rows) {
      const int left = block.count - first;
      // Strips of nearly equal width: a strip of one vector has too few sums to keep the FMA units busy.
      const int lanes = ceil_div(ceil_div(left, W), strips - i) * W;
      s.strips[i] = make_strip<T>(block.rows, block.scoring, first, left < lanes ? left : lanes);
      for (int l = 0; l < lanes && !block.resumes; ++l) {
        const double sink = first + l < block.count ? block.rows[first + l].sink : minus_infinity<double>;
        start_softmax(sink, row_max[first + l], row_sum[first + l]);
      }
      Engine::pack_queries(block.rows + first, s.strips[i].rows, block.head_dim, lanes, queries_of(block, s, first));
      T* out = out_of(block, s, first);
      const std::int64_t resumed = block.resumes ? resume(block, s.strips[i], out) : 0;
      for (std::int64_t d = resumed; d < Engine::dim_rows(block.value_dim) * lanes; d += W)
        store(out + d, broadcast(T(0)));
    }
  }

  // Reads the outputs of a strip, and pads its maxima and sums. Returns the number of elements read.
  static std::int64_t resume(const RowBlock& block, const Strip& strip, T* out) {
    const int lanes = strip.vectors * W, first = strip.first_row;
    for (int row = first + strip.rows; row < first + lanes; ++row)
      start_softmax(minus_infinity<double>, static_cast<T*>(block.row_max)[row], static_cast<T*>(block.row_sum)[row]);
    rows_to_columns(out, lanes, lanes, block.value_dim, [&](int row, std::int64_t d, int n) {
      return row < strip.rows ? load_up_to(static_cast<const T*>(block.rows[first + row].out) + d, n) : broadcast(T(0));
    });
    return block.value_dim * lanes;
  }

  static void absorb(const RowBlock& block, const KeyBlock& keys) noexcept {
    const Memory s(block);
    if (block.scoring.bias && !block.scoring.bias_at_hand) touch_bias(block, keys);
    // Called for each key block, not once for all: between key blocks, the driver may run the caller's signal handlers,
    // and these may use the tile registers.
    Engine::start();
    Block prepared = Engine::prepare(block, keys, s.memory);
    for (int i = 0; i < strips_of(block.count); ++i) {
      const Strip& strip = s.strips[i];
      // The keys of the block from the first to the last that any row of the strip can see.
      const std::int64_t end = keys.first + keys.count;
      const std::int64_t from = strip.begin_min > keys.first ? strip.begin_min : keys.first;
      const std::int64_t to = strip.end_max < end ? strip.end_max : end;
      if (from >= to) continue;
      const int skipped = static_cast<int>(from - keys.first) / Engine::alignment * Engine::alignment;
      const SeenKeys seen{keys.first + skipped, skipped, static_cast<int>(to - keys.first) - skipped};
      absorb_strip<Vectors>(block, s, strip, seen, prepared);
    }
    Engine::stop();
  }

  static T* out_of(const RowBlock& block, const Memory& s, int first_row) {
    return s.out + first_row * Engine::dim_rows(block.value_dim);
  }

  static T* queries_of(const RowBlock& block, const Memory& s, int first_row) {
    return s.queries + first_row * Engine::query_cells(block.head_dim);
  }

  // Reads the bias row by row before strips read it column by column, for a few blocks of keys at a time. The biases of
  // these keys fit in L2 and leave room for other data.
  static void touch_bias(const RowBlock& block, const KeyBlock& keys) {
    constexpr std::int64_t bytes = 384 << 10;
    const std::int64_t stride = block.scoring.bias_stride;
    const std::int64_t fitting = bytes / (block.count * (stride > 0 ? stride : 1)) / block.key_block;
    const std::int64_t count = (fitting > 1 ? fitting : 1) * block.key_block;
    if (keys.first % count != 0) return;
    touch_biases(block.rows, block.count, stride, keys.first, keys.first + count);
  }

  // Whether the multiplier can be applied later, while exponentials are computed. It can if no step in between needs
  // scaled scores: adding relative products does not, and setting hidden scores to -inf does not if the multiplier is
  // positive.
  static bool can_defer_scale(const RowBlock& block) {
    return static_cast<T>(block.scoring.multiplier) > T(0) && block.scoring.softcap == 0 && !block.scoring.alibi &&
           !has_terms(block.scoring) && !block.rows[0].scores;
  }

  // The scores of a strip, before the rows are described.
  [[gnu::always_inline]] static ScoreTile<T> tile_of(const Memory& s, const Strip& strip, const Row* rows,
                                                     const SeenKeys& keys, int lanes) {
    return {.scores = s.scores,
            .terms = nullptr,
            .outer = keys.count,
            .lanes = lanes,
            .stride = lanes,
            .limited = strip.begin_max > keys.first || strip.end_min < keys.first + keys.count,
            .limits = s.limits,
            .rows = rows,
            .num_rows = strip.rows,
            .shares_terms = strip.shares_terms,
            .first_key = keys.first,
            .num_keys = keys.count};
  }

  // Which keys of a tile its rows see. Only needed if some value is not finite.
  struct Visibility {
    bool hides_some;  // whether some key may be hidden from some row
    const Scoring& scoring;
    const ScoreTile<T>& tile;
    T* terms;  // memory for mask and bias in the shape of the tile; null if they hide no key

    bool hides(int key) const { return selfattn::SELFATTN_ISA::hides(tile, scoring, key); }  // from all rows
    // A tile for `visible`.
    ScoreTile<T> described() const {
      ScoreTile<T> result = tile;
      describe_rows(result, tile.lanes);
      if (terms) result.terms = gather_terms<AcrossRows>(result, scoring, terms);
      return result;
    }
  };

  template <int Cols>
  static void absorb_strip(const RowBlock& block, const Memory& s, const Strip& strip, const SeenKeys& keys,
                           Block& prepared) {
    if constexpr (Cols > 1)
      if (strip.vectors < Cols) return absorb_strip<Cols - 1>(block, s, strip, keys, prepared);
    constexpr int lanes = Cols * W;
    const Row* rows = block.rows + strip.first_row;
    const ScoreTile<T> tile = tile_of(s, strip, rows, keys, lanes);
    if (tile.limited || block.scoring.alibi || has_terms(block.scoring)) describe_rows(tile, lanes);
    const Sight sight = has_terms(block.scoring) ? sight_of(tile, block.scoring) : Sight::everything;
    if (sight == Sight::nothing && !rows->scores) return;

    const StripQueries<T> queries{rows, strip.rows, queries_of(block, s, strip.first_row)};
    T multiplier = static_cast<T>(block.scoring.multiplier);
    Engine::template score<Cols>(prepared, keys, queries, multiplier, s.scores);
    if (rows->relative) add_relative<AcrossRows>(tile, Engine::scales ? multiplier : T(1));
    if (Engine::scales || !can_defer_scale(block)) {
      if (!Engine::scales) change_scores(tile, [&](Vec<T> score, int, int) { return score * broadcast(multiplier); });
      multiplier = T(1);
    }
    const bool hidden = complete_scores<AcrossRows>(tile, block.scoring, sight);

    Vec<T> rescale[Cols];
    const ScoreLines<T> lines{s.scores, s.scores + keys.count * lanes, lanes};
    const auto keep = [&](const Vec<T>(&prob)[Engine::cell], T* line, int lane) {
      Engine::keep_probs(prepared, prob, lines.scores, line, lane);
    };
    if (block.scoring.dropout) {
      const T* factors =
          dropout_factors(block.scoring.dropout, {rows, strip.rows, lanes}, keys.first, keys.count, s.terms);
      exponentiate<Cols>(block, strip, lines, multiplier, rescale, [&](Vec<T>(&prob)[Engine::cell], T* line, int lane) {
        const T* factor = factors + (line - lines.scores) + lane;
        for (int i = 0; i < Engine::cell; ++i) prob[i] = prob[i] * load(factor + i * lanes);
        keep(prob, line, lane);
      });
    } else {
      exponentiate<Cols>(block, strip, lines, multiplier, rescale, keep);
    }
    Engine::template accumulate<Cols>(
        prepared, keys, s.scores, rescale, out_of(block, s, strip.first_row),
        Visibility{tile.limited || hidden, block.scoring, tile, hidden ? s.terms : nullptr});
  }

  // Multiplies scores by `factor`, unless the engine has scaled them, and computes their probs. keep(prob, line, lane)
  // stores the probs.
  template <int Cols, class Keep>
  [[gnu::always_inline]] static void exponentiate(const RowBlock& block, const Strip& strip, const ScoreLines<T>& lines,
                                                  T factor, Vec<T> (&rescale)[Cols], Keep keep) {
    T* row_max = static_cast<T*>(block.row_max) + strip.first_row;
    T* row_sum = static_cast<T*>(block.row_sum) + strip.first_row;
    SoftmaxStep<T, Cols> step;
    for (int c = 0; c < Cols; ++c) step.peak[c] = load(row_max + c * W);
    softmax<AcrossRows, Engine::cell>(
        lines, step, [&](Vec<T> score) { return Engine::scales ? score : score * broadcast(factor); }, keep);
    for (int c = 0; c < Cols; ++c) {
      rescale[c] = step.rescale[c];
      store(row_max + c * W, step.peak[c]);
      store(row_sum + c * W, fma(load(row_sum + c * W), rescale[c], step.sum[c]));
    }
  }

  static void finish(const RowBlock& block) noexcept {
    use_out_type<T>(block.out_type, [&](auto element) { finish_as<decltype(element)>(block); });
  }

  template <class Out>
  static void finish_as(const RowBlock& block) {
    const Memory s(block);
    const T* row_sum = static_cast<const T*>(block.row_sum);
    for (int i = 0; i < strips_of(block.count); ++i) {
      const Strip& strip = s.strips[i];
      const int lanes = strip.vectors * W, first = strip.first_row;
      Vec<T> factor[Vectors];
      for (int c = 0; c < strip.vectors; ++c) factor[c] = output_factor(load(row_sum + first + c * W), block.normalise);
      const T* out = out_of(block, s, first);
      columns_to_rows<T>(
          strip.rows, block.value_dim, [&](int row) { return static_cast<Out*>(block.rows[first + row].out); },
          [&](std::int64_t d, int row) { return load(out + d * lanes + row) * factor[row / W]; });
    }
  }

  static constexpr AttendKernel kernel{
      "tile", Engine::unit, Engine::operands, Engine::operands, Engine::packs, false, strip_rows, scratch_bytes, begin,
      absorb, finish};
};

}  // namespace selfattn::SELFATTN_ISA
