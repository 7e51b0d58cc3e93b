// The backward pass of attention for a block of query rows of one head against a range of keys (decision 10). As in
// attend_tile.h, vectors run across rows:
//
//   scores[key][row]  = key . query              probs   = 2^(scores - shift) * factor
//   dprobs[key][row]  = value . dout             dscores = probs * (dprobs - delta)
//   dquery[dim][row] += key[dim] * dscores[key][row]
//
// The gradients of keys and values are sums over rows, so there vectors run along the head:
//
//   dkey[key][dim]   += dscores[key][row] * query[row][dim]
//   dvalue[key][dim] += probs[key][row] * dout[row][dim]
//
// A block of rows consists of strips, as in the forward pass. Sums over rows go through all strips of a block at once.
#pragma once
#include "kernels/dropout.h"
#include "kernels/engine_fma.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

// Vectors that hold `count` elements, in elements: the step between rows of operands.
template <class T>
constexpr std::int64_t padded(std::int64_t count) {
  return (count + Vec<T>::width - 1) / Vec<T>::width * Vec<T>::width;
}

// TileRows and Vectors are the shape of tiles with vectors across rows, SumRows and SumVectors that of tiles with
// vectors along the head.
template <class T, int TileRows, int Vectors, int SumRows, int SumVectors>
struct TileBackward {
  using Engine = FmaEngine<T, TileRows>;
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
    T* original;  // the same: scores before the softmax, to tell hidden keys
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

  // Rows that share registers, and the keys of the current key block that at least one of them may see.
  struct Strip {
    int first_row;
    int rows;
    std::int64_t begin_min, begin_max;  // of key_begin over the rows
    std::int64_t end_min, end_max;      // of key_end over the rows
    bool shares_terms;
  };

  // A block of keys in scratch memory.
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
    each_strip(block, [&](const Strip& strip, auto columns) {
      const int lanes = columns.value * W;
      pack(static_cast<const T*>(block.queries) + strip.first_row * key_step, key_step, strip.rows, block.head_dim,
           lanes, s.queries + strip.first_row * block.head_dim);
      pack(static_cast<const T*>(block.dout) + strip.first_row * value_step, value_step, strip.rows, block.value_dim,
           lanes, s.dout + strip.first_row * block.value_dim);
      T* dquery = s.dquery + strip.first_row * block.head_dim;
      for (std::int64_t i = 0; i < block.head_dim * lanes; i += W) store(dquery + i, broadcast(T(0)));
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
      constexpr int lanes = decltype(columns)::value * W;
      const T* dquery = s.dquery + strip.first_row * block.head_dim;
      T* rows = static_cast<T*>(block.dquery) + strip.first_row * key_step;
      columns_to_rows<T>(
          strip.rows, block.head_dim, [&](int row) { return rows + row * key_step; },
          [&](std::int64_t d, int row) { return load(dquery + d * lanes + row); });
    });
  }

 private:
  template <int N>
  struct Columns {
    static constexpr int value = N;
  };

  // Calls use(strip, Columns<vectors of the strip>()).
  template <class Use>
  static void each_strip(const BackwardBlock& block, Use use) {
    for (int first = 0; first < block.count; first += strip_rows) {
      const Strip strip = make_strip(block, first);
      with_columns<Vectors>((strip.rows + W - 1) / W, [&](auto columns) { use(strip, columns); });
    }
  }
  template <int N, class Use>
  static void with_columns(int vectors, Use use) {
    if constexpr (N > 1)
      if (vectors < N) return with_columns<N - 1>(vectors, use);
    use(Columns<N>());
  }

  static Strip make_strip(const BackwardBlock& block, int first) {
    const Row* rows = block.rows + first;
    const int left = block.count - first;
    Strip strip{first,
                left < strip_rows ? left : strip_rows,
                rows[0].key_begin,
                rows[0].key_begin,
                rows[0].key_end,
                rows[0].key_end,
                !block.terms.bias_at_hand};
    for (int i = 1; i < strip.rows; ++i) {
      const std::int64_t begin = rows[i].key_begin, end = rows[i].key_end;
      strip.begin_min = begin < strip.begin_min ? begin : strip.begin_min;
      strip.begin_max = begin > strip.begin_max ? begin : strip.begin_max;
      strip.end_min = end < strip.end_min ? end : strip.end_min;
      strip.end_max = end > strip.end_max ? end : strip.end_max;
      strip.shares_terms = strip.shares_terms && rows[i].mask == rows[0].mask && rows[i].bias == rows[0].bias;
    }
    return strip;
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
    const int skipped = static_cast<int>(from - keys.first);
    const SeenKeys seen{from, skipped, static_cast<int>(to - from)};
    each_strip(block, [&](const Strip& strip, auto columns) {
      hides = absorb_strip<decltype(columns)::value>(block, s, strip, keys, seen) || hides;
    });
    const std::int64_t key_step = padded<T>(block.head_dim), value_step = padded<T>(block.value_dim);
    const bool careful = hides && !block.finite;
    const RowSums dkeys{s.dscores, s.block_lanes, static_cast<const T*>(block.queries), key_step,
                        careful ? s.original : nullptr};
    const RowSums dvalues{s.probs, s.block_lanes, static_cast<const T*>(block.dout), value_step,
                          careful ? s.original : nullptr};
    add_row_sums<SumVectors>(dkeys, seen.count, block.count, keys.dkeys + skipped * key_step);
    add_row_sums<SumVectors>(dvalues, seen.count, block.count, keys.dvalues + skipped * value_step);
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
    add_key_sums<Cols>(keys.keys + own.skipped * key_step, key_step, count, s.dscores + place, s.block_lanes,
                       block.head_dim, hides && !block.finite ? s.original + place : nullptr,
                       s.dquery + strip.first_row * block.head_dim);
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
    if (block.dscores)
      keep_dscores<Cols>(block, strip, seen, capped ? s.dprobs : s.dscores + place, capped ? Cols * W : s.block_lanes);
  }

  // Stores the gradients of the scores in rows, for gradients of what is added to scores.
  template <int Cols>
  static void keep_dscores(const BackwardBlock& block, const Strip& strip, const SeenKeys& seen, const T* dscores,
                           std::int64_t step) {
    T* to = static_cast<T*>(block.dscores) + strip.first_row * block.dscore_step + (seen.first - block.first_key);
    columns_to_rows<T>(
        strip.rows, seen.count, [&](int row) { return to + row * block.dscore_step; },
        [&](std::int64_t key, int row) { return load(dscores + key * step + row); });
  }

  // dquery[dim][row] += sum over keys of key[dim] * dscores[key][row]. `original`: scores that tell which keys are
  // hidden, if those must be skipped instead of multiplied by 0.
  template <int Cols>
  [[gnu::noinline]] static void add_key_sums(const T* keys, std::int64_t key_step, int count, const T* dscores,
                                             std::int64_t step, std::int64_t head_dim, const T* original, T* dquery) {
    if (original) return add_visible_keys<Cols>(keys, key_step, count, dscores, step, head_dim, original, dquery);
    multiply_rows<TileRows, Cols, FmaUnit<T>>(Transposed<T>{keys, key_step}, head_dim, dscores, step, count,
                                              [&](std::int64_t dim, const auto& sums) {
                                                T* to = dquery + dim * Cols * W;
                                                for (const auto& row : sums)
                                                  for (int c = 0; c < Cols; ++c, to += W) store(to, load(to) + row[c]);
                                              });
  }

  template <int Cols>
  static void add_visible_keys(const T* keys, std::int64_t key_step, int count, const T* dscores, std::int64_t step,
                               std::int64_t head_dim, const T* original, T* dquery) {
    for (std::int64_t dim = 0; dim < head_dim; ++dim)
      for (int c = 0; c < Cols; ++c, dquery += W) {
        Vec<T> sum = broadcast(T(0));
        for (int key = 0; key < count; ++key) {
          const Mask<T> hidden = load(original + key * step + c * W) == broadcast(minus_infinity<T>);
          const Vec<T> element = broadcast(keys[key * key_step + dim]);
          sum = select(hidden, sum, fma(element, load(dscores + key * step + c * W), sum));
        }
        store(dquery, load(dquery) + sum);
      }
  }

  // Sums over rows: sums[key][dim] += sum over rows of factors[key][row] * rows[row][dim].
  struct RowSums {
    const T* factors;
    std::int64_t factor_step;
    const T* rows;
    std::int64_t row_step;
    const T* original;  // as in add_key_sums
  };

  template <int Cols>
  static void add_row_sums(const RowSums& sums, int keys, int rows, T* to, std::int64_t dim = 0) {
    if (sums.original) return add_visible_rows(sums, keys, rows, to);
    for (; sums.row_step - dim >= Cols * W; dim += Cols * W) multiply_row_sums<Cols>(sums, keys, rows, to, dim);
    if constexpr (Cols > 1)
      if (dim < sums.row_step) add_row_sums<Cols - 1>(sums, keys, rows, to, dim);
  }

  template <int Cols>
  [[gnu::noinline]] static void multiply_row_sums(const RowSums& sums, int keys, int rows, T* to, std::int64_t dim) {
    const std::int64_t step = sums.row_step;
    multiply_rows<SumRows, Cols, FmaUnit<T>>(RowMajor<T>{sums.factors, sums.factor_step}, keys, sums.rows + dim, step,
                                             rows, [&](std::int64_t key, const auto& tile) {
                                               T* sum = to + key * step + dim;
                                               for (const auto& row : tile) {
                                                 for (int c = 0; c < Cols; ++c)
                                                   store(sum + c * W, load(sum + c * W) + row[c]);
                                                 sum += step;
                                               }
                                             });
  }

  static void add_visible_rows(const RowSums& sums, int keys, int rows, T* to) {
    for (int key = 0; key < keys; ++key)
      for (std::int64_t dim = 0; dim < sums.row_step; dim += W, to += W) {
        Vec<T> sum = broadcast(T(0));
        for (int row = 0; row < rows; ++row) {
          if (sums.original[key * sums.factor_step + row] == minus_infinity<T>) continue;
          sum = fma(broadcast(sums.factors[key * sums.factor_step + row]), load(sums.rows + row * sums.row_step + dim),
                    sum);
        }
        store(to, load(to) + sum);
      }
  }

  static bool finite(const void* numbers, std::int64_t count) noexcept {
    return all_finite([&](int) { return static_cast<const T*>(numbers); }, 1, count);
  }

  static double dot(const void* a, const void* b, std::int64_t count) noexcept {
    Vec<T> sum = broadcast(T(0));
    for (std::int64_t i = 0; i < count; i += W)
      sum = fma(load(static_cast<const T*>(a) + i), load(static_cast<const T*>(b) + i), sum);
    return static_cast<double>(reduce_sum(sum));
  }

 public:
  static constexpr BackwardKernel kernel{strip_rows, W, scratch_bytes, run, finite, dot};
};

}  // namespace selfattn::SELFATTN_ISA
