// The backward pass of attention for a block of query rows of one head against a range of keys (decision 10). As in
// attend_tile.h, vectors run across rows:
//
//   scores[key][row]  = key . query              probs   = 2^(scores - shift) * factor
//   dprobs[key][row]  = value . dout             dscores = probs * (dprobs - delta)
//   dquery[dim][row] += key[dim] * dscores[key][row]
//
// The gradients of keys and values are sums over rows. Their vectors run along head_dim and value_dim:
//
//   dkey[key][dim]   += dscores[key][row] * query[row][dim]
//   dvalue[key][dim] += probs[key][row] * dout[row][dim]
//
// A block of rows consists of strips, as in the forward pass. Sums over rows go through all strips of a block at once.
#pragma once
#include "kernels/ahead.h"
#include "kernels/backward_relative.h"
#include "kernels/backward_strips.h"
#include "kernels/backward_sums.h"
#include "kernels/dropout.h"
#include "kernels/engine_fma.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

// TileRows and Vectors are the shape of tiles with vectors across rows, SumRows and SumVectors that of tiles with
// vectors along head_dim or value_dim.
template <class T, int TileRows, int Vectors, int SumRows, int SumVectors>
struct TileBackward {
  using Engine = FmaEngine<T, TileRows>;
  using Sums = BackwardSums<T, TileRows, SumRows>;
  using Relative = RelativeBackward<T, TileRows, Vectors, SumRows, SumVectors>;
  static constexpr int W = Vec<T>::width;
  static constexpr int strip_rows = Vectors * W;

  struct Scratch {
    T* queries;   // per strip [head_dim][lanes]
    T* dout;      // per strip [value_dim][lanes]
    T* dquery;    // per strip [head_dim][lanes]
    T* scores;    // [key_block][lanes] of one strip
    T* dprobs;    // the same
    T* slopes;    // the same: derivative of the softcap
    T* factors;   // the same and a few lines more: see dropout_factors
    T* probs;     // [key_block][block_lanes] of all strips
    T* dscores;   // the same
    T* original;  // the same: scores before the softmax, in which hidden keys are -inf
    RowPlaces<T> places;
    std::int64_t block_lanes;
    std::size_t bytes;

    Scratch(void* base, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : Scratch(Carver{static_cast<char*>(base)}, rows, key_block, head_dim, value_dim) {}
    Scratch(Carver carver, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : places(carver, strip_rows), block_lanes(padded<T>(rows)) {
      queries = carver.take<T>(block_lanes * head_dim);
      dout = carver.take<T>(block_lanes * value_dim);
      dquery = carver.take<T>(block_lanes * head_dim);
      const std::int64_t tile = std::int64_t{key_block} * strip_rows, wide = key_block * block_lanes;
      scores = carver.take<T>(tile);
      dprobs = carver.take<T>(tile);
      slopes = carver.take<T>(tile);
      factors = carver.take<T>(factor_lines(key_block) * strip_rows);
      probs = carver.take<T>(wide);
      dscores = carver.take<T>(wide);
      original = carver.take<T>(wide);
      bytes = carver.used;
    }
    explicit Scratch(const BackwardBlock& block)
        : Scratch(block.scratch, block.count, block.key_block, block.head_dim, block.value_dim) {}
  };

  // A block of keys and values, and the sums of their gradients.
  struct Keys {
    std::int64_t first;
    int count;
    const T *keys, *values;
    T *dkeys, *dvalues;
  };

  static std::size_t scratch_bytes(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim) {
    return Scratch(nullptr, rows, key_block, head_dim, value_dim).bytes;
  }

  static void run(const BackwardBlock& block) noexcept {
    const Scratch s(block);
    const std::int64_t key_step = padded<T>(block.head_dim), value_step = padded<T>(block.value_dim);
    if (block.terms.bias && !block.terms.bias_at_hand)
      touch_biases(block.rows, block.count, block.terms.bias_step, block.first_key, block.first_key + block.key_count);
    each_strip(block, [&](const Strip& strip, auto columns) {
      const int lanes = columns.value * W;
      pack(static_cast<const T*>(block.queries) + strip.first_row * key_step, key_step, strip.rows, block.head_dim,
           lanes, s.queries + strip.first_row * block.head_dim);
      pack(static_cast<const T*>(block.dout) + strip.first_row * value_step, value_step, strip.rows, block.value_dim,
           lanes, s.dout + strip.first_row * block.value_dim);
      Sums::template clear<columns.value>(block.head_dim, s.dquery + strip.first_row * block.head_dim);
    });
    for (int done = 0; done < block.key_count; done += block.key_block) {
      const int left = block.key_count - done;
      absorb(
          block, s,
          {block.first_key + done, left < block.key_block ? left : block.key_block,
           static_cast<const T*>(block.keys) + done * key_step, static_cast<const T*>(block.values) + done * value_step,
           static_cast<T*>(block.dkeys) + done * key_step, static_cast<T*>(block.dvalues) + done * value_step});
    }
    each_strip(block, [&](const Strip& strip, auto columns) {
      Sums::template store_rows<columns.value>(s.dquery + strip.first_row * block.head_dim, strip.rows, block.head_dim,
                                               static_cast<T*>(block.dquery) + strip.first_row * key_step, key_step);
    });
  }

 private:
  // Calls use(strip, Columns<vectors of the strip>()).
  template <class Use>
  static void each_strip(const BackwardBlock& block, Use use) {
    each_strip_of<T, Vectors>(block.count, [&](int first, int rows, auto columns) {
      use(make_strip<T>(block.rows, block.terms, first, rows), columns);
    });
  }

  static void pack(const T* rows, std::int64_t step, int count, std::int64_t width, int lanes, T* columns) {
    rows_to_columns(columns, lanes, lanes, width, [&](int row, std::int64_t d, int) {
      return row < count ? load(rows + row * step + d) : broadcast(T(0));
    });
  }

  static void absorb(const BackwardBlock& block, const Scratch& s, const Keys& keys) {
    // The keys that some row sees, and whether any of them is hidden from another row.
    std::int64_t from = keys.first + keys.count, to = keys.first;
    bool hides = false;
    each_strip(block, [&](const Strip& strip, auto) {
      from = strip.begin_min < from ? strip.begin_min : from;
      to = strip.end_max > to ? strip.end_max : to;
    });
    from = from > keys.first ? from : keys.first;
    to = to < keys.first + keys.count ? to : keys.first + keys.count;
    if (from >= to) return;
    const SeenKeys seen{from, static_cast<int>(from - keys.first), static_cast<int>(to - from)};
    each_strip(block, [&](const Strip& strip, auto columns) {
      hides = absorb_strip<decltype(columns)::value>(block, s, strip, keys, seen) || hides;
    });
    const std::int64_t key_step = padded<T>(block.head_dim), value_step = padded<T>(block.value_dim);
    const bool careful = hides && !block.finite;
    const Skipped<T> skipped{careful ? s.original : nullptr, minus_infinity<T>};
    Sums::template add_row_sums<SumVectors>(
        {s.dscores, s.block_lanes, static_cast<const T*>(block.queries), key_step, skipped}, seen.count, block.count,
        keys.dkeys + seen.skipped * key_step);
    Sums::template add_row_sums<SumVectors>(
        {s.probs, s.block_lanes, static_cast<const T*>(block.dout), value_step, skipped}, seen.count, block.count,
        keys.dvalues + seen.skipped * value_step);
  }

  // Computes probs and dscores of a strip, and adds to its dquery. Returns whether some key is hidden from some row.
  // `seen`: the keys that some row of the block sees, at which probs and dscores start.
  template <int Cols>
  static bool absorb_strip(const BackwardBlock& block, const Scratch& s, const Strip& strip, const Keys& keys,
                           const SeenKeys& seen) {
    constexpr int lanes = Cols * W;
    const std::int64_t end = seen.first + seen.count;
    const std::int64_t from = strip.begin_min > seen.first ? strip.begin_min : seen.first;
    const std::int64_t to = strip.end_max < end ? strip.end_max : end;
    if (from >= to) {
      hide<Cols>(s, strip, 0, seen.count);
      return true;
    }
    const int before = static_cast<int>(from - seen.first), count = static_cast<int>(to - from);
    hide<Cols>(s, strip, 0, before);
    hide<Cols>(s, strip, before + count, seen.count);
    const bool limited = strip.begin_max > from || strip.end_min < to;
    ScoreTile<T> tile{.scores = s.scores,
                      .terms = nullptr,
                      .outer = count,
                      .lanes = lanes,
                      .step = lanes,
                      .limited = limited,
                      .places = s.places,
                      .rows = block.rows + strip.first_row,
                      .num_rows = strip.rows,
                      .shares_terms = strip.shares_terms,
                      .first_key = from,
                      .num_keys = count};
    if (limited || block.terms.alibi || has_terms(block.terms)) describe_rows(tile, lanes);
    const Sight sight = has_terms(block.terms) ? sight_of(tile, block.terms) : Sight::everything;
    if (sight == Sight::nothing) {
      hide<Cols>(s, strip, before, before + count);
      return true;
    }
    const SeenKeys own{from, seen.skipped + before, count};
    const std::int64_t key_step = padded<T>(block.head_dim), value_step = padded<T>(block.value_dim);
    typename Engine::Block keys_in{keys.keys, key_step, nullptr, 0, nullptr, false};
    typename Engine::Block values_in{keys.values, value_step, nullptr, 0, nullptr, false};
    Engine::template score<Cols>(keys_in, own, {tile.rows, strip.rows, s.queries + strip.first_row * block.head_dim},
                                 block.head_dim, 0, static_cast<T>(block.terms.multiplier), s.scores);
    const bool hides = complete(block, s, tile, sight) || limited || count < seen.count;
    Engine::template score<Cols>(values_in, own, {tile.rows, strip.rows, s.dout + strip.first_row * block.value_dim},
                                 block.value_dim, 0, T(1), s.dprobs);
    if (block.dweights) add_dweights(block, s, tile);
    const std::int64_t place = before * s.block_lanes + strip.first_row;
    if (!block.finite) keep_original<Cols>(s, place, count);
    const Dropout& dropout = block.terms.dropout;
    const T* factors =
        dropout ? dropout_factors(dropout, {tile.rows, strip.rows, lanes}, from, count, s.factors) : nullptr;
    differentiate<Cols>(block, s, strip, own, place, factors);
    const Skipped<T> skipped{hides && !block.finite ? s.original + place : nullptr, minus_infinity<T>};
    Sums::template add_key_sums<Cols>(
        {keys.keys + own.skipped * key_step, key_step, count, s.dscores + place, s.block_lanes, skipped},
        block.head_dim, s.dquery + strip.first_row * block.head_dim);
    return hides;
  }

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
    const std::int64_t key_count = seen.count;
    const Vec<T> nothing = broadcast(minus_infinity<T>), zero = broadcast(T(0));
    Vec<T> shift[Cols], factor[Cols], delta[Cols];
    for (int c = 0; c < Cols; ++c) {
      const std::int64_t row = strip.first_row + c * W;
      shift[c] = load(static_cast<const T*>(block.shift) + row);
      factor[c] = load(static_cast<const T*>(block.factor) + row);
      delta[c] = load(static_cast<const T*>(block.delta) + row);
    }
    const bool capped = block.terms.softcap != 0;
    for (std::int64_t key = 0; key < key_count; ++key)
      for (int c = 0; c < Cols; ++c) {
        const std::int64_t cell = (key * Cols + c) * W, wide = place + key * s.block_lanes + c * W;
        const Vec<T> score = load(s.scores + cell);
        const Mask<T> hidden = score == nothing;
        const Vec<T> prob = select(hidden, zero, exp2(score - shift[c]) * factor[c]);
        Vec<T> weight = prob, dprob = load(s.dprobs + cell);
        if (factors) {
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
    const std::int64_t first = seen.first - block.first_key;
    const Lines own{s.dscores + place, s.block_lanes}, uncapped{s.dprobs, Cols * W};
    if (block.dscores)
      keep(capped ? uncapped : own, strip, key_count, static_cast<T*>(block.dscores) + first, block.dscore_step);
    if (block.dproducts) keep(own, strip, key_count, static_cast<T*>(block.dproducts) + first, block.dproduct_step);
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

 public:
  static constexpr BackwardKernel kernel{strip_rows,   W,         scratch_bytes, run, Relative::run,
                                         Sums::finite, Sums::dot, Sums::add};
};

}  // namespace selfattn::SELFATTN_ISA
