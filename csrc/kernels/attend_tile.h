// Attention for many query rows: vectors run across rows.
//
//   scores[key][row] = key . query         keys broadcast as they stand in memory, queries packed once per block
//   online softmax down the keys           maxima and sums are vertical: no shuffles
//   out[dim][row] += value[dim] * probs[key][row]     values broadcast as they stand in memory
//
// K and V are never packed or copied, and a ragged end of keys or dims is just fewer broadcasts. A block of rows is a
// number of strips; a strip is as many rows as `Vectors` registers hold. Strips know which keys their rows can see, so
// causal and window limits cost at most half a strip.
#pragma once
#include "kernels/ahead.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

template <class T, int TileRows, int Vectors>
struct TileAttention {
  static constexpr int W = Vec<T>::width;
  static constexpr int strip_rows = Vectors * W;

  struct Strip {
    int first_row;
    int rows;
    int vectors;                        // registers that hold these rows
    std::int64_t begin_min, begin_max;  // over the rows' key_begin ...
    std::int64_t end_min, end_max;      // ... and key_end
    bool shares_terms;                  // all rows read the same mask and bias
  };

  struct Scratch {
    Strip* strips;
    T* queries;  // per strip [head_dim][lanes]
    T* out;      // per strip [value_dim][lanes]
    T* scores;   // [key_block][lanes]
    T* terms;    // the same shape
    T *begin, *end, *distance, *slope;
    std::size_t bytes;

    Scratch(void* base, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim) {
      Carver carver{static_cast<char*>(base)};
      const int count = (rows + strip_rows - 1) / strip_rows;
      const std::int64_t lanes = (rows + W - 1) / W * W;  // of all strips: the last one may have fewer vectors
      strips = carver.take<Strip>(count);
      queries = carver.take<T>(lanes * head_dim);
      out = carver.take<T>(lanes * value_dim);
      scores = carver.take<T>(std::int64_t{key_block} * strip_rows);
      terms = carver.take<T>(std::int64_t{key_block} * strip_rows);
      begin = carver.take<T>(strip_rows);
      end = carver.take<T>(strip_rows);
      distance = carver.take<T>(strip_rows);
      slope = carver.take<T>(strip_rows);
      bytes = carver.used;
    }
    explicit Scratch(const RowBlock& block)
        : Scratch(block.scratch, block.count, block.key_block, block.head_dim, block.value_dim) {}
  };

  static std::size_t scratch_bytes(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim) {
    return Scratch(nullptr, rows, key_block, head_dim, value_dim).bytes;
  }

  static Strip make_strip(const RowBlock& block, int first_row) {
    const Row* rows = block.rows + first_row;
    const int left = block.count - first_row;
    const int count = left < strip_rows ? left : strip_rows;
    Strip strip{first_row,         count,           (count + W - 1) / W, rows[0].key_begin,
                rows[0].key_begin, rows[0].key_end, rows[0].key_end,     /*shares_terms=*/true};
    for (int i = 1; i < count; ++i) {
      const std::int64_t begin = rows[i].key_begin, end = rows[i].key_end;
      strip.begin_min = begin < strip.begin_min ? begin : strip.begin_min;
      strip.begin_max = begin > strip.begin_max ? begin : strip.begin_max;
      strip.end_min = end < strip.end_min ? end : strip.end_min;
      strip.end_max = end > strip.end_max ? end : strip.end_max;
      strip.shares_terms = strip.shares_terms && rows[i].mask == rows[0].mask && rows[i].bias == rows[0].bias;
    }
    return strip;
  }

  static void begin(const RowBlock& block) noexcept {
    const Scratch s(block);
    T* row_max = static_cast<T*>(block.row_max);
    T* row_sum = static_cast<T*>(block.row_sum);
    for (int first = 0, i = 0; first < block.count; first += strip_rows, ++i) {
      s.strips[i] = make_strip(block, first);
      const int lanes = s.strips[i].vectors * W;
      for (int l = 0; l < lanes; ++l) {
        const double sink = first + l < block.count ? block.rows[first + l].sink : minus_infinity<double>;
        row_max[first + l] = static_cast<T>(sink);
        row_sum[first + l] = sink == minus_infinity<double> ? T(0) : T(1);
      }
      rows_to_columns(s.queries + first * block.head_dim, lanes, lanes, block.head_dim,
                      [&](int row, std::int64_t d, int n) {
                        if (first + row >= block.count) return broadcast(T(0));
                        return load_up_to(static_cast<const T*>(block.rows[first + row].query) + d, n);
                      });
      T* out = s.out + first * block.value_dim;
      for (std::int64_t d = 0; d < block.value_dim * lanes; d += W) store(out + d, broadcast(T(0)));
    }
  }

  static void absorb(const RowBlock& block, const KeyBlock& keys) noexcept {
    const Scratch s(block);
    if (block.terms.bias != BiasType::none) touch_bias(block, keys);
    bool fetches = true;  // the first strip that works asks for the memory of all
    for (int first = 0, i = 0; first < block.count; first += strip_rows, ++i) {
      const Strip& strip = s.strips[i];
      // The part of the block that any row of the strip can see.
      const std::int64_t end = keys.first + keys.count;
      const std::int64_t from = strip.begin_min > keys.first ? strip.begin_min : keys.first;
      const std::int64_t to = strip.end_max < end ? strip.end_max : end;
      if (from >= to) continue;
      const std::int64_t skipped = from - keys.first;
      const KeyBlock seen{from,
                          static_cast<int>(to - from),
                          static_cast<const T*>(keys.keys) + skipped * keys.key_step,
                          keys.key_step,
                          static_cast<const T*>(keys.values) + skipped * keys.value_step,
                          keys.value_step,
                          fetches ? keys.next_keys : nullptr};
      absorb_strip<Vectors>(block, s, strip, seen, fetches);
      fetches = false;
    }
  }

  // Strips read the bias crosswise, which memory serves slowly: it is read from end to end before, as many keys at a
  // time as leave L2 room for the rest.
  static void touch_bias(const RowBlock& block, const KeyBlock& keys) {
    constexpr std::int64_t bytes = 384 << 10;
    const std::int64_t step = block.terms.bias_step;
    const std::int64_t fitting = bytes / (block.count * (step > 0 ? step : 1)) / block.key_block;
    const std::int64_t window = (fitting > 1 ? fitting : 1) * block.key_block;
    if (keys.first % window != 0) return;
    for (int r = 0; r < block.count; ++r) {
      const Row& row = block.rows[r];
      const std::int64_t end = row.key_end < keys.first + window ? row.key_end : keys.first + window;
      if (keys.first < end && (r == 0 || row.bias != block.rows[r - 1].bias))
        touch(row.bias + keys.first * step, (end - keys.first - 1) * step + 1);  // nothing behind the last one
    }
  }

  template <int Cols>
  static void absorb_strip(const RowBlock& block, const Scratch& s, const Strip& strip, const KeyBlock& keys,
                           bool fetches) {
    if constexpr (Cols > 1)
      if (strip.vectors < Cols) return absorb_strip<Cols - 1>(block, s, strip, keys, fetches);
    constexpr int lanes = Cols * W;
    const bool limited = strip.begin_max > keys.first || strip.end_min < keys.first + keys.count;
    if (limited || block.terms.alibi || has_terms(block.terms)) describe_rows(block, s, strip, keys);
    ScoreTile<T> tile{s.scores, nullptr, keys.count, lanes, lanes, limited, s.begin, s.end, s.distance, s.slope};
    const Row* rows = block.rows + strip.first_row;
    bool terms = has_terms(block.terms);
    if (terms) {
      const int different = strip.shares_terms ? 1 : strip.rows;
      const Sight sight = sight_of<T>(rows, different, block.terms, keys.first, keys.count);
      if (sight == Sight::nothing && !rows->scores) return;
      terms = sight != Sight::everything;
    }

    score_keys<Cols>(
        static_cast<const T*>(keys.keys), keys.key_step, keys.count, s.queries + strip.first_row * block.head_dim,
        block.head_dim, static_cast<T>(block.terms.multiplier), s.scores,
        Ahead<T>{fetches ? static_cast<const T*>(keys.values) : nullptr, keys.value_step, block.value_dim});
    bend_scores<AcrossRows>(tile, block.terms);
    const bool hidden = terms && add_terms<Cols>(block, s, strip, keys);
    hide_beyond_limits<AcrossRows>(tile);
    if (rows->scores) keep_scores(block, s, strip, keys);

    Vec<T> rescale[Cols];
    softmax<Cols>(block, strip, tile, rescale);
    T* out = s.out + strip.first_row * block.value_dim;
    if ((limited || hidden) &&
        !all_finite(static_cast<const T*>(keys.values), keys.value_step, keys.count, block.value_dim)) {
      if (hidden) tile.terms = gather_terms(block, s, strip, keys);
      return accumulate_visible<Cols>(block, tile, keys, rescale, out);
    }
    accumulate<Cols>(static_cast<const T*>(keys.values), keys.value_step, keys.count, s.scores, rescale,
                     block.value_dim, out,
                     Ahead<T>{static_cast<const T*>(keys.next_keys), keys.key_step, block.head_dim});
  }

  template <int Rows, int Cols>
  static constexpr std::int64_t rows_of(const Vec<T> (&)[Rows][Cols]) {
    return Rows;
  }

  // The two products stand alone so that their loops have all registers for themselves.
  template <int Cols>
  [[gnu::noinline]] static void score_keys(const T* keys, std::int64_t key_step, int count, const T* queries,
                                           std::int64_t head_dim, T multiplier, T* scores, const Ahead<T>& values) {
    multiply_rows<TileRows, Cols, T>(RowMajor<T>{keys, key_step}, count, queries, Cols * W, head_dim,
                                     [&](std::int64_t key, const auto& sums) {
                                       T* score = scores + key * Cols * W;
                                       values.fetch(key, key + rows_of(sums));
                                       for (const auto& row : sums)
                                         for (int c = 0; c < Cols; ++c, score += W)
                                           store(score, row[c] * broadcast(multiplier));
                                     });
  }

  template <int Cols>
  [[gnu::noinline]] static void accumulate(const T* values, std::int64_t value_step, int count, const T* probs,
                                           const Vec<T> (&rescale)[Cols], std::int64_t value_dim, T* out,
                                           const Ahead<T>& next_keys) {
    multiply_rows<TileRows, Cols, T>(
        Transposed<T>{values, value_step}, value_dim, probs, Cols * W, count, [&](std::int64_t dim, const auto& sums) {
          T* o = out + dim * Cols * W;
          next_keys.fetch(count * dim / value_dim, count * (dim + rows_of(sums)) / value_dim);
          for (const auto& row : sums)
            for (int c = 0; c < Cols; ++c, o += W) store(o, fma(load(o), rescale[c], row[c]));
        });
  }

  // Limits and positions of the strip's rows, counted from the block's first key. Lanes without a row see everything.
  static void describe_rows(const RowBlock& block, const Scratch& s, const Strip& strip, const KeyBlock& keys) {
    const auto within = [&](std::int64_t key) {
      const std::int64_t relative = key - keys.first;
      return static_cast<T>(relative < 0 ? 0 : relative > keys.count ? keys.count : relative);
    };
    for (int l = 0; l < strip.vectors * W; ++l) {
      const Row* row = l < strip.rows ? block.rows + strip.first_row + l : nullptr;
      s.begin[l] = row ? within(row->key_begin) : T(0);
      s.end[l] = row ? within(row->key_end) : static_cast<T>(keys.count);
      s.distance[l] = row ? static_cast<T>(row->position - keys.first) : T(0);
      s.slope[l] = row ? static_cast<T>(row->slope * log2_e) : T(0);
    }
  }

  // scores += terms; returns whether any key is hidden. Squares of terms go from rows to columns in registers.
  template <int Cols>
  static bool add_terms(const RowBlock& block, const Scratch& s, const Strip& strip, const KeyBlock& keys) {
    const Row* rows = block.rows + strip.first_row;
    constexpr int lanes = Cols * W;
    AddTerm<T> add;
    for (int j = 0; j < keys.count; j += W) {
      const int n = keys.count - j < W ? keys.count - j : W;
      T* scores = s.scores + j * lanes;
      if (strip.shares_terms) {  // a mask of keys alone: read once, then the same for every lane
        T terms[W];
        store(terms, term_chunk<T>(rows[0], block.terms, keys.first + j, n));
        for (int i = 0; i < n; ++i)
          for (int l = 0; l < lanes; l += W)
            store(scores + i * lanes + l, add(load(scores + i * lanes + l), broadcast(terms[i])));
        continue;
      }
      for (int l = 0; l < lanes; l += W) {
        Vec<T> square[W];
        for (int i = 0; i < W; ++i)
          square[i] = l + i < strip.rows ? term_chunk<T>(rows[l + i], block.terms, keys.first + j, n) : broadcast(T(0));
        transpose(square);
        for (int i = 0; i < n; ++i) store(scores + i * lanes + l, add(load(scores + i * lanes + l), square[i]));
      }
    }
    return any(add.hidden);
  }

  // The terms alone, for the rare tile that needs them twice.
  static const T* gather_terms(const RowBlock& block, const Scratch& s, const Strip& strip, const KeyBlock& keys) {
    const int lanes = strip.vectors * W;
    rows_to_columns(s.terms, lanes, lanes, keys.count, [&](int row, std::int64_t j, int n) {
      if (row >= strip.rows) return broadcast(T(0));
      return term_chunk<T>(block.rows[strip.first_row + row], block.terms, keys.first + j, n);
    });
    return s.terms;
  }

  static void keep_scores(const RowBlock& block, const Scratch& s, const Strip& strip, const KeyBlock& keys) {
    const int lanes = strip.vectors * W;
    columns_to_rows<T>(
        strip.rows, keys.count,
        [&](int row) { return static_cast<T*>(block.rows[strip.first_row + row].scores) + keys.first; },
        [&](std::int64_t key, int row) { return load(s.scores + key * lanes + row); });
  }

  // Scores become probs = 2^(score - max); rescale is what the sums and outputs so far are worth under the new maximum.
  template <int Cols>
  static void softmax(const RowBlock& block, const Strip& strip, const ScoreTile<T>& tile, Vec<T> (&rescale)[Cols]) {
    T* row_max = static_cast<T*>(block.row_max) + strip.first_row;
    T* row_sum = static_cast<T*>(block.row_sum) + strip.first_row;
    const Vec<T> nothing = broadcast(minus_infinity<T>);
    Vec<T> peak[Cols], shift[Cols], sum[Cols];
    for (int c = 0; c < Cols; ++c) peak[c] = load(row_max + c * W);
    for (int key = 0; key < tile.outer; ++key)
      for (int c = 0; c < Cols; ++c) peak[c] = max(peak[c], load(tile.scores + key * tile.step + c * W));
    for (int c = 0; c < Cols; ++c) {
      // -inf minus -inf is NaN; a row that has seen no key yet shifts by 0 and keeps its weights at 0.
      shift[c] = select(peak[c] == nothing, broadcast(T(0)), peak[c]);
      rescale[c] = exp2(load(row_max + c * W) - shift[c]);
      store(row_max + c * W, peak[c]);
      sum[c] = broadcast(T(0));
    }
    for (int key = 0; key < tile.outer; ++key)
      for (int c = 0; c < Cols; ++c) {
        T* score = tile.scores + key * tile.step + c * W;
        const Vec<T> prob = exp2(load(score) - shift[c]);
        store(score, prob);
        sum[c] = sum[c] + prob;
      }
    for (int c = 0; c < Cols; ++c) store(row_sum + c * W, fma(load(row_sum + c * W), rescale[c], sum[c]));
  }

  // The same sums in the same order as multiply_rows, but a hidden key is left out instead of multiplied by 0.
  template <int Cols>
  static void accumulate_visible(const RowBlock& block, const ScoreTile<T>& tile, const KeyBlock& keys,
                                 const Vec<T> (&rescale)[Cols], T* out) {
    const T* values = static_cast<const T*>(keys.values);
    for (std::int64_t dim = 0; dim < block.value_dim; ++dim)
      for (int c = 0; c < Cols; ++c, out += W) {
        Vec<T> sum = broadcast(T(0));
        for (int key = 0; key < keys.count; ++key) {
          const Vec<T> value = broadcast(values[key * keys.value_step + dim]);
          const Vec<T> prob = load(tile.scores + key * tile.step + c * W);
          sum = select(visible<AcrossRows>(tile, key, c * W), fma(value, prob, sum), sum);
        }
        store(out, fma(load(out), rescale[c], sum));
      }
  }

  static void finish(const RowBlock& block) noexcept {
    const Scratch s(block);
    const T* row_sum = static_cast<const T*>(block.row_sum);
    for (int first = 0, i = 0; first < block.count; first += strip_rows, ++i) {
      const Strip& strip = s.strips[i];
      const int lanes = strip.vectors * W;
      Vec<T> factor[Vectors];
      for (int c = 0; c < strip.vectors; ++c) {
        const Vec<T> sum = load(row_sum + first + c * W);
        const Vec<T> one = broadcast(T(1));
        // A row that saw nothing has sum 0 and output 0.
        factor[c] = block.normalise ? one / select(sum == broadcast(T(0)), one, sum) : one;
      }
      const T* out = s.out + first * block.value_dim;
      columns_to_rows<T>(
          strip.rows, block.value_dim, [&](int row) { return static_cast<T*>(block.rows[first + row].out); },
          [&](std::int64_t d, int row) { return load(out + d * lanes + row) * factor[row / W]; });
    }
  }

  static constexpr AttendKernel kernel{"tile", strip_rows, scratch_bytes, begin, absorb, finish};
};

}  // namespace selfattn::SELFATTN_ISA
