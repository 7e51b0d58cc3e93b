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
#include "kernels/backward_scores.h"
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
  using Scores = BackwardScores<T, Vectors>;
  using Scratch = typename Scores::Scratch;
  using Relative = RelativeBackward<T, TileRows, Vectors, SumRows, SumVectors>;
  static constexpr int W = Vec<T>::width;
  static constexpr int strip_rows = Vectors * W;

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
      Scores::template hide<Cols>(s, strip, 0, seen.count);
      return true;
    }
    const int before = static_cast<int>(from - seen.first), count = static_cast<int>(to - from);
    Scores::template hide<Cols>(s, strip, 0, before);
    Scores::template hide<Cols>(s, strip, before + count, seen.count);
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
      Scores::template hide<Cols>(s, strip, before, before + count);
      return true;
    }
    const SeenKeys own{from, seen.skipped + before, count};
    const std::int64_t key_step = padded<T>(block.head_dim), value_step = padded<T>(block.value_dim);
    typename Engine::Block keys_in{keys.keys, key_step, nullptr, 0, nullptr, false};
    typename Engine::Block values_in{keys.values, value_step, nullptr, 0, nullptr, false};
    Engine::template score<Cols>(keys_in, own, {tile.rows, strip.rows, s.queries + strip.first_row * block.head_dim},
                                 block.head_dim, 0, static_cast<T>(block.terms.multiplier), s.scores);
    const bool hides = Scores::complete(block, s, tile, sight) || limited || count < seen.count;
    Engine::template score<Cols>(values_in, own, {tile.rows, strip.rows, s.dout + strip.first_row * block.value_dim},
                                 block.value_dim, 0, T(1), s.dprobs);
    if (block.dweights) Scores::add_dweights(block, s, tile);
    const std::int64_t place = before * s.block_lanes + strip.first_row;
    if (!block.finite) Scores::template keep_original<Cols>(s, place, count);
    const Dropout& dropout = block.terms.dropout;
    const T* factors =
        dropout ? dropout_factors(dropout, {tile.rows, strip.rows, lanes}, from, count, s.factors) : nullptr;
    Scores::template differentiate<Cols>(block, s, strip, own, place, factors);
    const Skipped<T> skipped{hides && !block.finite ? s.original + place : nullptr, minus_infinity<T>};
    Sums::template add_key_sums<Cols>(
        {keys.keys + own.skipped * key_step, key_step, count, s.dscores + place, s.block_lanes, skipped},
        block.head_dim, s.dquery + strip.first_row * block.head_dim);
    return hides;
  }

 public:
  static constexpr BackwardKernel kernel{strip_rows,   W,         scratch_bytes, run, Relative::run,
                                         Sums::finite, Sums::dot, Sums::add};
};

}  // namespace selfattn::SELFATTN_ISA
