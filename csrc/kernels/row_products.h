// The row kernel's products of queries and keys: vectors run along head_dim. With one or two rows, memory bandwidth is
// the limit, so keys are read one after the other. With more rows, the load ports are a limit as well, so several keys
// are processed at a time: each load of a query is used for all of these keys. Keys are processed in bunches that stay
// in L1 while all rows use them, and later keys are prefetched.
#pragma once
#include "kernels/ahead.h"
#include "kernels/element_type.h"
#include "kernels/kernel_set.h"
#include "kernels/row_values.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

// How queries and keys are multiplied. Q and E: their types in memory; `elements`: numbers per vector.
template <class T, class E>
struct FmaDots {
  using Q = T;
  static constexpr const char* unit = "fma";
  static constexpr int elements = Vec<T>::width;
  static Vec<T> load_whole(const E* p) { return load(p); }
  static Vec<T> load_some(const E* p, std::int64_t n) { return load_up_to(p, n); }
  static Vec<T> load_query(const Q* p, std::int64_t n) { return load_up_to(p, n); }
  static Vec<T> add_product(Vec<T> query, Vec<T> key, Vec<T> sum) { return fma(query, key, sum); }
  // Whether the unit treats subnormal numbers as 0. Then a subnormal number times Inf is NaN, which recompute_dots
  // corrects.
  static constexpr bool flushes = false;
};

// MaxSums: how many vector accumulators fit in the registers together with their operands. E: type of keys and values
// in memory.
template <class T, int MaxSums, class E, class Dots>
struct RowProducts {
  static constexpr int W = Vec<T>::width;
  static constexpr int max_rows_at_once = W < 4 ? W : 4;
  // For float and 16-bit keys, 12 KiB of rows of 128 numbers. The pages of a KV cache need this distance: hardware
  // prefetchers start again in each page.
  static constexpr int keys_ahead = sizeof(E) < sizeof(float) ? 48 : 24;
  static_assert(keys_ahead + W <= rows_ahead);
  static constexpr std::int64_t widest = INT64_MAX;  // the largest head_dim
  // Up to this many rows, reading one key after the other matters more than saving loads of queries.
  static constexpr int rows_by_key = 2;

  static std::int64_t padded(std::int64_t count) { return round_up(count, W); }

  struct Memory {
    std::int64_t query_stride, out_stride;
    int score_stride;
    T* queries;  // [row][query_stride], as Dots loads them, zero-padded
    T* out;      // [row][out_stride]
    T* scores;   // [row][score_stride]
    T* terms;    // [row][score_stride]
    T* rescale;
    const void** value_rows;  // KeyBlock::value_rows without values that are not finite
    E* zeros;                 // [value_dim]
    RowLimits<T> limits;
    std::size_t bytes;

    Memory(void* base, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : Memory(Carver{static_cast<char*>(base)}, rows, key_block, head_dim, value_dim) {}
    Memory(Carver carver, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : query_stride(ceil_div(head_dim, Dots::elements) * W),
          out_stride(padded(value_dim)),
          score_stride(static_cast<int>(padded(key_block))),
          limits(carver, rows) {
      queries = carver.take<T>(rows * query_stride);
      out = carver.take<T>(rows * out_stride);
      scores = carver.take<T>(std::int64_t{rows} * score_stride);
      terms = carver.take<T>(std::int64_t{rows} * score_stride);
      rescale = carver.take<T>(rows);
      value_rows = carver.take<const void*>(key_block + rows_ahead);
      zeros = carver.take<E>(value_dim);
      bytes = carver.used;
    }
    explicit Memory(const RowBlock& block)
        : Memory(block.scratch, block.count, block.key_block, block.head_dim, block.value_dim) {}
  };

  // Called when the query of a row has been loaded.
  static void prepare(const RowBlock&, const Memory&, int) {}

  // The sums of values for a vector of dims.
  static Vec<T> load_out(const Memory& s, int row, std::int64_t dim) { return load(s.out + row * s.out_stride + dim); }
  static void store_out(const Memory& s, int row, std::int64_t dim, Vec<T> sums) {
    store(s.out + row * s.out_stride + dim, sums);
  }

  // scores = q . k * multiplier
  static void score(const RowBlock& block, const Memory& s, const KeyBlock& keys) {
    for (int first = 0; first < keys.count; first += bunch_keys) {
      const int last = keys.count - first < bunch_keys ? keys.count : first + bunch_keys;
      if (block.count <= rows_by_key)
        dot_rows<max_rows_at_once, 1>(block, s, keys, first, last, 0);
      else
        dot_rows<max_rows_at_once, 4>(block, s, keys, first, last, 0);
    }
  }

  using Values = FmaValues<T, MaxSums, E>;

  static bool finite_values(const KeyBlock& keys, std::int64_t value_dim) {
    if constexpr (scaled<E>) return all_finite([&](int) { return keys.value_scales; }, 1, keys.count);
    return all_finite([&](int j) { return row_of<E>(keys.value_rows, j); }, keys.count, value_dim);
  }

 private:
  // Computes the scores of the keys in [first, last), `Rows` rows at a time and `Abreast` keys at a time. For the
  // remaining rows, `Rows` is halved. Not inlined, so that the loop has all registers to itself.
  template <int Rows, int Abreast>
  [[gnu::noinline]] static void dot_rows(const RowBlock& block, const Memory& s, const KeyBlock& keys, int first,
                                         int last, int row) {
    constexpr int Keys = W / Rows;  // Rows * Keys sums fill one vector
    constexpr int abreast = Abreast < Keys ? Abreast : Keys;
    constexpr int elements = Dots::elements;
    const std::int64_t whole = block.head_dim / elements * elements, tail = block.head_dim - whole;
    const Vec<T> multiplier = broadcast(static_cast<T>(block.scoring.multiplier));
    for (; row + Rows <= block.count; row += Rows)
      for (int j = first; j < last; j += Keys) {
        const T* queries = s.queries + row * s.query_stride;
        Vec<T> sums[W];
#pragma GCC unroll 16
        for (int k = 0; k < Keys; k += abreast) {
          const E* key[abreast];    // beyond the end, these are keys to prefetch; their sums go to hidden lanes
          const E* later[abreast];  // to prefetch; the first rows do it for all rows
          for (int i = 0; i < abreast; ++i) {
            key[i] = row_of<E>(keys.key_rows, j + k + i);
            later[i] = row_of<E>(keys.key_rows, j + k + i + (row == 0 ? keys_ahead : 0));
          }
          Vec<T> dots[abreast][Rows];
          for (auto& line : dots)
            for (Vec<T>& dot : line) dot = broadcast(T(0));
          constexpr bool whole_lines = elements * static_cast<int>(sizeof(E)) % cache_line == 0;
          if (row == 0 && !whole_lines)
            for (const E* rows : later) fetch_lines(rows, block.head_dim);
          const auto step = [&](std::int64_t d, auto load_key) {
            Vec<T> right[abreast];
            for (int i = 0; i < abreast; ++i) {
              if (whole_lines) fetch_ahead(later[i] + d, key[i] + d + 2 * elements);
              right[i] = load_key(key[i] + d);
            }
            for (int r = 0; r < Rows; ++r) {
              const Vec<T> query = in_register(load(queries + r * s.query_stride + d / (elements / W)));
              for (int i = 0; i < abreast; ++i) dots[i][r] = Dots::add_product(query, right[i], dots[i][r]);
            }
          };
          for (std::int64_t d = 0; d < whole; d += elements) step(d, [](const E* p) { return Dots::load_whole(p); });
          if (tail != 0) step(whole, [tail](const E* p) { return Dots::load_some(p, tail); });
          for (int i = 0; i < abreast; ++i)
            for (int r = 0; r < Rows; ++r) sums[r * Keys + k + i] = dots[i][r];
        }
        T products[W];
        const Vec<T> dots = reduce_sums(sums) * multiplier;
        store(products, dots);
        if constexpr (Dots::flushes)
          if (any(is_nan(dots))) recompute_dots<Rows>(block, keys, row, j, products);
        for (int r = 0; r < Rows; ++r)
          for (int k = 0; k < Keys; ++k) s.scores[(row + r) * s.score_stride + j + k] = products[r * Keys + k];
      }
    if constexpr (Rows > 1)
      if (row < block.count) dot_rows<Rows / 2, Abreast>(block, s, keys, first, last, row);
  }

  // Recomputes products that became NaN, with scalar FMAs, which follow IEEE 754. Products of hidden keys are not
  // needed.
  template <int Rows>
  static void recompute_dots(const RowBlock& block, const KeyBlock& keys, int row, int key, T* products) {
    constexpr int Keys = W / Rows;
    for (int i = 0; i < W; ++i) {
      const int index = key + i % Keys;
      if (products[i] == products[i] || index >= keys.count) continue;
      const Row& own = block.rows[row + i / Keys];
      if (hides<T>(own, block.scoring, keys.first + index)) continue;
      const auto* query = static_cast<const typename Dots::Q*>(own.query);
      const E* data = row_of<E>(keys.key_rows, index);
      T sum = 0;
      for (std::int64_t d = 0; d < block.head_dim; ++d) sum = __builtin_fmaf(widen(query[d]), widen(data[d]), sum);
      products[i] = sum * static_cast<T>(block.scoring.multiplier);
    }
  }
};

}  // namespace selfattn::SELFATTN_ISA
