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
#include "kernels/backward_units.h"
#include "kernels/dropout.h"
#include "kernels/engine_fma.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

// Operands are read as cells of the unit (backward_units.h). A cell has the type T in the code, even if it holds two
// numbers. Tiles whose vectors run across rows have the shape TileRows x Vectors. Tiles whose vectors run along
// head_dim or value_dim have the shape SumRows x SumVectors.
template <class Unit, int TileRows, int Vectors, int SumRows, int SumVectors>
struct TileBackward {
  using T = typename Unit::Real;
  using Sums = BackwardSums<Unit, TileRows, SumRows>;
  using Scores = BackwardScores<Unit, Vectors>;
  using Memory = typename Scores::Memory;
  static constexpr int W = Vec<T>::width, cell = Unit::cell;
  static constexpr int strip_rows = Vectors * W;

  // A block of keys and values, the sums of their gradients, and `joined`: the keys as cells of adjacent keys.
  struct Keys {
    std::int64_t first;
    int count;
    const T *keys, *values;
    T *dkeys, *dvalues;
    const T* joined;
  };

  // Queries and dout of a block of rows, as cells of adjacent rows.
  struct Rows {
    const T *queries, *dout;
  };

  // Cells from one row of operands to the next, and elements from one row of sums to the next.
  static std::int64_t stride(std::int64_t width) { return padded<T>(cells<Unit>(width)); }
  static std::int64_t sum_stride(std::int64_t width) { return padded<T>(width); }

  static std::size_t scratch_bytes(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim) {
    return Memory(nullptr, rows, key_block, head_dim, value_dim).bytes;
  }

  static void run(const BackwardBlock& block) noexcept {
    const Memory s(block);
    const std::int64_t key_stride = stride(block.head_dim), value_stride = stride(block.value_dim);
    if (block.scoring.bias && !block.scoring.bias_at_hand)
      touch_biases(block.rows, block.count, block.scoring.bias_stride, block.first_key,
                   block.first_key + block.key_count);
    each_strip(block, [&](const Strip& strip, auto columns) {
      const int lanes = columns.value * W;
      pack(static_cast<const T*>(block.queries) + strip.first_row * key_stride, strip.rows, block.head_dim, lanes,
           queries_of(block, s, strip));
      pack(static_cast<const T*>(block.dout) + strip.first_row * value_stride, strip.rows, block.value_dim, lanes,
           dout_of(block, s, strip));
      if (block.dquery)
        Sums::template clear<columns.value>(block.head_dim, s.dquery + strip.first_row * block.head_dim);
    });
    const Rows rows{
        Unit::join(static_cast<const T*>(block.queries), key_stride, block.count, block.head_dim, s.joined_queries),
        Unit::join(static_cast<const T*>(block.dout), value_stride, block.count, block.value_dim, s.joined_dout)};
    for (int done = 0; done < block.key_count; done += block.key_block) {
      const int left = block.key_count - done, count = left < block.key_block ? left : block.key_block;
      absorb(block, s, rows,
             {block.first_key + done, count, static_cast<const T*>(block.keys) + done * key_stride,
              static_cast<const T*>(block.values) + done * value_stride,
              sums_at(block.dkeys, done * sum_stride(block.head_dim)),
              sums_at(block.dvalues, done * sum_stride(block.value_dim)), nullptr});
    }
    if (!block.dquery) return;
    each_strip(block, [&](const Strip& strip, auto columns) {
      Sums::template store_rows<columns.value>(
          s.dquery + strip.first_row * block.head_dim, strip.rows, block.head_dim,
          static_cast<T*>(block.dquery) + strip.first_row * sum_stride(block.head_dim), sum_stride(block.head_dim));
    });
  }

 private:
  // Calls use(strip, Columns<vectors of the strip>()).
  template <class Use>
  static void each_strip(const BackwardBlock& block, Use use) {
    each_strip_of<T, Vectors>(block.count, [&](int first, int rows, auto columns) {
      use(make_strip<T>(block.rows, block.scoring, first, rows), columns);
    });
  }

  static void pack(const T* rows, int count, std::int64_t width, int lanes, T* columns) {
    rows_to_columns(columns, lanes, lanes, cells<Unit>(width), [&](int row, std::int64_t c, int) {
      return row < count ? load(rows + row * stride(width) + c) : broadcast(T(0));
    });
  }

  static T* queries_of(const BackwardBlock& block, const Memory& s, const Strip& strip) {
    return s.queries + strip.first_row * cells<Unit>(block.head_dim);
  }
  static T* dout_of(const BackwardBlock& block, const Memory& s, const Strip& strip) {
    return s.dout + strip.first_row * cells<Unit>(block.value_dim);
  }

  // Sums from an element on; null if they are not wanted.
  static T* sums_at(void* sums, std::int64_t element) { return sums ? static_cast<T*>(sums) + element : nullptr; }

  // Keys [begin, end).
  struct KeyRange {
    std::int64_t begin, end;
  };

  // The intersection of `seen` and `all`, extended to whole cells. The added keys are treated as hidden.
  static KeyRange whole_cells(const KeyRange& seen, const KeyRange& all) {
    if (seen.begin >= all.end || seen.end <= all.begin || seen.begin >= seen.end) return {all.end, all.end};
    const std::int64_t begin = seen.begin > all.begin ? seen.begin : all.begin;
    const std::int64_t end = all.begin + cells<Unit>(seen.end - all.begin) * cell;
    return {begin - (begin - all.begin) % cell, end < all.end ? end : all.end};
  }

  static void absorb(const BackwardBlock& block, const Memory& s, const Rows& rows, Keys keys) {
    // `some`: the keys from the first to the last that any row sees. `hides`: whether one of these keys may be hidden
    // from a row.
    const KeyRange all{keys.first, keys.first + keys.count};
    KeyRange some{all.end, all.begin};
    bool hides = false;
    each_strip(block, [&](const Strip& strip, auto) {
      some.begin = strip.begin_min < some.begin ? strip.begin_min : some.begin;
      some.end = strip.end_max > some.end ? strip.end_max : some.end;
    });
    const auto [from, to] = whole_cells(some, all);
    if (from == to) return;
    if (block.dquery)
      keys.joined = Unit::join(keys.keys, stride(block.head_dim), keys.count, block.head_dim, s.joined_keys);
    const SeenKeys seen{from, static_cast<int>(from - keys.first), static_cast<int>(to - from)};
    each_strip(block, [&](const Strip& strip, auto columns) {
      hides = absorb_strip<decltype(columns)::value>(block, s, strip, keys, seen) || hides;
    });
    add_row_sums(block, s, rows, keys, seen, hides && !block.finite);
  }

  // Adds to the gradients of the block's keys and values. Near the diagonal of a causal problem, later keys are hidden
  // from the first strips: the sums over a key's rows leave out the strips that do not see the key.
  static void add_row_sums(const BackwardBlock& block, const Memory& s, const Rows& rows, const Keys& keys,
                           const SeenKeys& seen, bool careful) {
    const std::int64_t key_stride = sum_stride(block.head_dim), value_stride = sum_stride(block.value_dim);
    const KeyRange all{seen.first, seen.first + seen.count};
    for (std::int64_t key = all.begin, next = all.end; key < all.end; key = next, next = all.end) {
      int first_row = block.count, end_row = 0;
      each_strip(block, [&](const Strip& strip, auto) {
        const KeyRange own = whole_cells({strip.begin_min, strip.end_max}, all);
        if (own.begin > key && own.begin < next) next = own.begin;
        if (own.end > key && own.end < next) next = own.end;
        if (own.begin > key || own.end <= key) return;
        first_row = strip.first_row < first_row ? strip.first_row : first_row;
        end_row = strip.first_row + strip.rows;
      });
      const int before = static_cast<int>(key - all.begin), count = static_cast<int>(next - key);
      const int row_count = end_row - first_row;
      const std::int64_t offset = before * s.block_lanes + first_row, to = seen.skipped + before;
      const Skipped<T> hidden{careful ? s.original + offset : nullptr, minus_infinity<T>, s.block_lanes};
      const auto add = [&](T* factors, const T* operands, std::int64_t stride, T* sums) {
        Sums::template add_row_sums<SumVectors>({s.line(factors, before, first_row), s.block_lanes / cell,
                                                 operands + first_row / cell * stride, stride, hidden},
                                                count, row_count, sums + to * stride);
      };
      if (row_count <= 0) continue;
      if (keys.dkeys) add(s.dscores, rows.queries, key_stride, keys.dkeys);
      if (keys.dvalues) add(s.probs, rows.dout, value_stride, keys.dvalues);
    }
  }

  // Computes probs and dscores of a strip, and adds to its dquery. Returns whether some key may be hidden from some
  // row. `seen`: the keys from the first to the last that any row of the block sees. The arrays probs and dscores start
  // at the first of them.
  template <int Cols>
  static bool absorb_strip(const BackwardBlock& block, const Memory& s, const Strip& strip, const Keys& keys,
                           const SeenKeys& seen) {
    constexpr int lanes = Cols * W;
    const auto [from, to] = whole_cells({strip.begin_min, strip.end_max}, {seen.first, seen.first + seen.count});
    if (from == to) {
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
                      .stride = lanes,
                      .limited = limited,
                      .limits = s.limits,
                      .rows = block.rows + strip.first_row,
                      .num_rows = strip.rows,
                      .shares_terms = strip.shares_terms,
                      .first_key = from,
                      .num_keys = count};
    if (limited || block.scoring.alibi || has_terms(block.scoring)) describe_rows(tile, lanes);
    const Sight sight = has_terms(block.scoring) ? sight_of(tile, block.scoring) : Sight::everything;
    if (sight == Sight::nothing) {
      Scores::template hide<Cols>(s, strip, before, before + count);
      return true;
    }
    const SeenKeys own{from, seen.skipped + before, count};
    multiply<Cols>(keys.keys, own, queries_of(block, s, strip), block.head_dim,
                   static_cast<T>(block.scoring.multiplier), s.scores);
    const bool hides = Scores::complete(block, s, tile, sight) || limited || count < seen.count;
    // If only gradients of values are wanted, dprobs is not computed, and the gradients of scores are meaningless.
    if (block.dquery || block.dkeys || block.dscores || block.dproducts)
      multiply<Cols>(keys.values, own, dout_of(block, s, strip), block.value_dim, T(1), s.dprobs);
    if (block.dweights) Scores::add_dweights(block, s, tile);
    const std::int64_t offset = before * s.block_lanes + strip.first_row;
    if (!block.finite) Scores::template keep_original<Cols>(s, offset, count);
    const Dropout& dropout = block.scoring.dropout;
    const T* factors =
        dropout ? dropout_factors(dropout, {tile.rows, strip.rows, lanes}, from, count, s.factors) : nullptr;
    Scores::template differentiate<Cols>(block, s, strip, own, before, factors);
    if (!block.dquery) return hides;
    const Skipped<T> skipped{hides && !block.finite ? s.original + offset : nullptr, minus_infinity<T>, s.block_lanes};
    const std::int64_t key_stride = sum_stride(block.head_dim);
    Sums::template add_key_sums<Cols>({keys.joined + own.skipped / cell * key_stride, key_stride, count,
                                       s.joined(before, strip.first_row), s.block_lanes, skipped},
                                      block.head_dim, s.dquery + strip.first_row * block.head_dim);
    return hides;
  }

  // products[key][row] = factor * key . row. Not inlined, so that the loop has all registers to itself.
  template <int Cols>
  [[gnu::noinline]] static void multiply(const T* keys, const SeenKeys& seen, const T* packed, std::int64_t width,
                                         T factor, T* products) {
    const RowMajor<T> left{keys + seen.skipped * stride(width), stride(width)};
    const RightOperand<T> right{packed, Cols * W, cells<Unit>(width)};
    store_products<TileRows, Cols, Unit>(left, seen.count, right, factor, products);
  }

  static constexpr decltype(BackwardKernel::run_relative) run_relative() {
    if constexpr (cell == 1)
      return RelativeBackward<T, TileRows, Vectors, SumRows, SumVectors>::run;
    else
      return nullptr;
  }

 public:
  static constexpr BackwardKernel kernel{dtype_of(typename Unit::Element()),
                                         strip_rows,
                                         W,
                                         scratch_bytes,
                                         run,
                                         run_relative(),
                                         Sums::finite,
                                         Sums::dot,
                                         Sums::add};
};

}  // namespace selfattn::SELFATTN_ISA
