// A tile kernel's two products with FMA: K and V are read in place, never packed or copied.
//
// An engine lays out operands for its unit and multiplies them:
//   start, stop     called before and after all other work on a block of keys
//   pack_queries    packs the queries of a strip, once per block of rows
//   prepare         prepares a block of keys and values, once for all strips that see it
//   score           scores[key][row] = key . query, times the multiplier if the engine `scales`
//   keep_probs      stores the probs of `cell` keys where accumulate expects them; `line`: the first key's scores
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

// The rows of a strip: in memory, and packed for the unit.
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
    Memory(Carver&, int, std::int64_t, std::int64_t) {}
  };

  struct Block {
    const T* keys;
    std::int64_t key_step;
    const T* values;
    std::int64_t value_step;
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

  static Block prepare(const RowBlock&, const KeyBlock& keys, const Memory&) {
    return {static_cast<const T*>(keys.keys),
            keys.key_step,
            static_cast<const T*>(keys.values),
            keys.value_step,
            keys.later_values,
            keys.later_keys};
  }

  // The two products are not inlined, so that their loops have all registers to themselves.
  template <int Cols>
  [[gnu::noinline]] static void score(const Block& block, const SeenKeys& seen, const StripQueries<T>& queries,
                                      std::int64_t head_dim, T multiplier, T* scores) {
    const RowMajor<T> keys{block.keys + seen.skipped * block.key_step, block.key_step};
    fetch_during(block.later_values, ceil_div(seen.count, TileRows), head_dim, [&](auto fetches) {
      store_products<TileRows, Cols, FmaUnit<T>>(keys, seen.count, queries.packed, head_dim, multiplier, scores,
                                                 fetches);
    });
  }

  static void keep_probs(const Block&, const Vec<T> (&prob)[cell], T*, T* line, int lane) {
    store(line + lane, prob[0]);  // replaces the score
  }

  // `hides`: some key of the block may be hidden from some row. tile() returns the ScoreTile that tells which.
  template <int Cols, class Tile>
  static void accumulate(Block& block, const SeenKeys& seen, const T* probs, const Vec<T> (&rescale)[Cols],
                         std::int64_t value_dim, T* out, bool hides, Tile tile) {
    const T* values = block.values + seen.skipped * block.value_step;
    if (hides && !all_finite([&](int j) { return values + j * block.value_step; }, seen.count, value_dim)) {
      accumulate_visible<Cols>(values, block.value_step, seen.count, probs, rescale, value_dim, out, tile());
    } else {
      multiply_values<Cols>({values, block.value_step}, seen.count, probs, rescale, value_dim, out, block.later_keys);
    }
    block.later_values = block.later_keys = {};
  }

 private:
  template <int Cols>
  [[gnu::noinline]] static void multiply_values(Transposed<T> values, int count, const T* probs,
                                                const Vec<T> (&rescale)[Cols], std::int64_t value_dim, T* out,
                                                const LaterRows& later_keys) {
    fetch_during(later_keys, ceil_div(value_dim, TileRows), count, [&](auto fetches) {
      add_products_to<TileRows, Cols, FmaUnit<T>>(values, value_dim, probs, count, rescale, out, fetches);
    });
  }

  // Computes the same sums in the same order as multiply_rows, but skips hidden keys instead of multiplying them by 0.
  template <int Cols>
  static void accumulate_visible(const T* values, std::int64_t value_step, int count, const T* probs,
                                 const Vec<T> (&rescale)[Cols], std::int64_t value_dim, T* out,
                                 const ScoreTile<T>& tile) {
    for (std::int64_t dim = 0; dim < value_dim; ++dim)
      for (int c = 0; c < Cols; ++c, out += W) {
        Vec<T> sum = broadcast(T(0));
        for (int key = 0; key < count; ++key) {
          const Vec<T> value = broadcast(values[key * value_step + dim]);
          const Vec<T> prob = load(probs + (key * Cols + c) * W);
          sum = select(visible<AcrossRows>(tile, key, c * W), fma(value, prob, sum), sum);
        }
        store(out, fma(load(out), rescale[c], sum));
      }
  }
};

}  // namespace selfattn::SELFATTN_ISA
