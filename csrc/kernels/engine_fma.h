// A tile kernel's two products with FMA: K and V are read in place, not packed. V is copied only if some key is hidden
// and some value is not finite.
//
// An engine lays out operands for its unit and multiplies them:
//   start, stop     called before and after all other work on a block of keys
//   pack_queries    packs the queries of a strip, once per block of rows
//   prepare         prepares a block of keys and values, once for all strips that see it
//   score           scores[key][row] = key . query, times the multiplier if the engine `scales`
//   keep_probs      stores the probs of `cell` keys where accumulate reads them; `line`: the scores of the first key
//   accumulate      out[dim][row] = out * rescale + sum over keys of value[dim] * probs[key][row]
// A strip may start at any key whose index within the block is a multiple of `alignment`.
#pragma once
#include "kernels/ahead.h"
#include "kernels/element_type.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

// The keys of a block that a strip of rows can see.
struct SeenKeys {
  std::int64_t first;  // index of the first key
  int skipped;         // keys of the block before the first
  int count;
};

// The queries of a strip: as rows in memory, and packed for the unit.
template <class T>
struct StripQueries {
  const Row* rows;
  int count;
  const T* packed;
};

template <class T, int TileRows>
struct FmaEngine {
  using Real = T;
  static constexpr int W = Vec<T>::width;
  static constexpr const char* unit = "fma";
  static constexpr bool packs = false;
  static constexpr DType operands = dtype_of(T());
  static constexpr int cell = 1, alignment = 1;
  static constexpr bool scales = true;

  struct Memory {
    T* values;  // [key][value_dim]: a copy without values that are not finite; see `accumulate`

    Memory(Carver& carver, int key_block, std::int64_t, std::int64_t value_dim)
        : values(carver.take<T>(key_block * value_dim)) {}
  };

  struct Block {
    std::int64_t head_dim, value_dim;
    const T* keys;
    std::int64_t key_stride;
    const T* values;
    std::int64_t value_stride;
    T* clean_values;                     // see Memory
    LaterRows later_values, later_keys;  // the strip that is computed first prefetches them for all strips
  };

  static void start() {}
  static void stop() {}
  static constexpr std::int64_t query_cells(std::int64_t head_dim) { return head_dim; }
  static constexpr std::int64_t key_rows(std::int64_t keys) { return keys; }
  static constexpr std::int64_t dim_rows(std::int64_t value_dim) { return value_dim; }

  static void pack_queries(const Row* rows, int count, std::int64_t head_dim, int lanes, T* queries) {
    rows_to_columns(queries, lanes, lanes, head_dim, [&](int row, std::int64_t d, int n) {
      return row < count ? load_up_to(static_cast<const T*>(rows[row].query) + d, n) : broadcast(T(0));
    });
  }

  static Block prepare(const RowBlock& rows, const KeyBlock& keys, const Memory& memory) {
    return {rows.head_dim,
            rows.value_dim,
            static_cast<const T*>(keys.keys),
            keys.key_stride,
            static_cast<const T*>(keys.values),
            keys.value_stride,
            memory.values,
            keys.later_values,
            keys.later_keys};
  }

  // The two products are not inlined, so that their loops have all registers to themselves.
  template <int Cols>
  [[gnu::noinline]] static void score(const Block& block, const SeenKeys& seen, const StripQueries<T>& queries,
                                      T multiplier, T* scores) {
    const RowMajor<T> keys{block.keys + seen.skipped * block.key_stride, block.key_stride};
    const RightOperand<T> packed{queries.packed, Cols * W, block.head_dim};
    fetch_during(block.later_values, ceil_div(seen.count, TileRows), block.head_dim, [&](auto fetches) {
      store_products<TileRows, Cols, FmaUnit<T>>(keys, seen.count, packed, multiplier, scores, fetches);
    });
  }

  static void keep_probs(const Block&, const Vec<T> (&prob)[cell], T*, T* line, int lane) {
    store(line + lane, prob[0]);  // replaces the score
  }

  // If a value that is not finite is hidden from all rows, the product reads a copy with 0 in its place. If some row
  // sees such a value, a slower path skips hidden keys.
  template <int Cols, class Visibility>
  static void accumulate(Block& block, const SeenKeys& seen, const T* probs, const Vec<T> (&rescale)[Cols], T* out,
                         const Visibility& visibility) {
    Transposed<T> values = values_of(block, seen);
    const auto value = [&](int key) { return values.data + key * values.stride; };
    const bool finite = !visibility.hides_some || all_finite(value, seen.count, block.value_dim);
    if (finite || copy_finite(block, seen.count, visibility, values))
      multiply_values<Cols>(block, values, seen.count, probs, rescale, out);
    else
      accumulate_visible<Cols>(block, seen, probs, rescale, out, visibility.described());
    block.later_values = block.later_keys = {};
  }

 private:
  static Transposed<T> values_of(const Block& block, const SeenKeys& seen) {
    return {block.values + seen.skipped * block.value_stride, block.value_stride};
  }

  // Replaces `values` by a copy in which values that are not finite and hidden from all rows are 0. Returns false if
  // some row sees a value that is not finite.
  template <class Visibility>
  static bool copy_finite(const Block& block, int count, const Visibility& visibility, Transposed<T>& values) {
    const std::int64_t value_dim = block.value_dim;
    T* to = block.clean_values;
    for (int key = 0; key < count; ++key, to += value_dim) {
      const T* from = values.data + key * values.stride;
      const bool finite = all_finite([&](int) { return from; }, 1, value_dim);
      if (!finite && !visibility.hides(key)) return false;
      for (std::int64_t d = 0; d < value_dim; d += W)
        store_up_to(to + d, finite ? load_up_to(from + d, value_dim - d) : broadcast(T(0)), value_dim - d);
    }
    values = {block.clean_values, value_dim};
    return true;
  }

  template <int Cols>
  [[gnu::noinline]] static void multiply_values(const Block& block, const Transposed<T>& values, int count,
                                                const T* probs, const Vec<T> (&rescale)[Cols], T* out) {
    const RightOperand<T> right{probs, Cols * W, count};
    fetch_during(block.later_keys, ceil_div(block.value_dim, TileRows), count, [&](auto fetches) {
      add_products_to<TileRows, Cols, FmaUnit<T>>(values, block.value_dim, right, rescale, out, fetches);
    });
  }

  // Computes the same sums in the same order as multiply_values, but skips hidden keys instead of multiplying their
  // values by 0.
  template <int Cols>
  static void accumulate_visible(const Block& block, const SeenKeys& seen, const T* probs,
                                 const Vec<T> (&rescale)[Cols], T* out, const ScoreTile<T>& tile) {
    const T* values = values_of(block, seen).data;
    for (std::int64_t dim = 0; dim < block.value_dim; ++dim)
      for (int c = 0; c < Cols; ++c, out += W) {
        Vec<T> sum = broadcast(T(0));
        for (int key = 0; key < seen.count; ++key) {
          const Vec<T> value = broadcast(values[key * block.value_stride + dim]);
          const Vec<T> prob = load(probs + (key * Cols + c) * W);
          sum = select(visible<AcrossRows>(tile, key, c * W), fma(value, prob, sum), sum);
        }
        store(out, fma(load(out), rescale[c], sum));
      }
  }
};

}  // namespace selfattn::SELFATTN_ISA
