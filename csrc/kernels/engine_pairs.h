// A tile kernel's two products with dot products of bfloat16 pairs (engine_fma.h defines the engine interface).
#pragma once
#include "kernels/pair_operands.h"
#include "kernels/tile_matmul.h"

namespace selfattn::SELFATTN_ISA {

struct PairUnit {
  using Real = float;
  static constexpr int cell = 2;
  static VecF add_product(VecF a, VecF b, VecF sum) { return add_products(a, b, sum); }
};

// The row kernel's dot products of queries and keys, which are bfloat16, so every product is exact. The row kernel's
// sums of values use FMA, so probs are not rounded to bfloat16.
struct PairDots {
  using Q = BFloat;
  static constexpr const char* unit = "bfloat16 dots";
  static constexpr int elements = 2 * VecF::width;
  static VecF load_whole(const BFloat* p) { return load_cells(p, elements); }
  static VecF load_some(const BFloat* p, std::int64_t n) { return load_cells(p, n); }
  static VecF load_query(const BFloat* p, std::int64_t n) { return load_cells(p, n); }
  static VecF add_product(VecF query, VecF key, VecF sum) { return add_products(query, key, sum); }
  static constexpr bool flushes = true;
};

// E: the type of the operands in memory. Each number is rounded to one bfloat16. Keys whose rows in memory are
// aligned pairs of bfloat16 are read in place, others are packed. Values are joined, row by row, into cells of two
// keys.
template <class E, int TileRows>
struct PairEngine : PairOperands<E, 1> {
  using Operands = PairOperands<E, 1>;
  using Operands::cell;
  using Operands::exact;
  using Operands::W;
  static constexpr const char* unit = "bfloat16 pairs";
  static constexpr int alignment = cell;
  static constexpr bool scales = true;

  struct Memory : Operands::Memory {
    Memory(Carver& carver, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : Operands::Memory(carver, key_block, head_dim, value_dim) {
      this->value_stride = Operands::whole(value_dim);
    }
  };

  struct Block : Operands::Block {
    RowMajor<float> cells;  // of keys: in place, or packed
    int count;
    LaterRows later_values, later_keys;  // the strip that is computed first prefetches them for all strips
    bool joined;                         // whether the values are packed already
  };

  static void start() {}
  static void stop() {}

  static Block prepare(const RowBlock& rows, const KeyBlock& keys, const Memory& memory) {
    Block block{Operands::original(rows, keys, memory),
                {static_cast<const float*>(keys.keys), keys.key_stride / cell},
                keys.count,
                keys.later_values,
                keys.later_keys,
                false};
    const bool aligned = reinterpret_cast<std::uintptr_t>(keys.keys) % alignof(float) == 0;
    if (exact && aligned && keys.key_stride % cell == 0 && rows.head_dim % cell == 0) return block;
    Operands::pack_keys(block, keys.count);
    block.cells = {memory.keys, memory.key_stride};
    return block;
  }

  template <int Cols>
  [[gnu::noinline]] static void score(const Block& block, const SeenKeys& seen, const StripQueries<float>& queries,
                                      float multiplier, float* scores) {
    const std::int64_t depth = ceil_div(block.head_dim, cell);
    const RowMajor<float> keys = block.cells.from_row(seen.skipped);
    const RightOperand<float> packed{queries.packed, Cols * W, depth};
    fetch_during(block.later_values, ceil_div(seen.count, TileRows), depth, [&](auto fetches) {
      store_products<TileRows, Cols, PairUnit>(keys, seen.count, packed, multiplier, scores, fetches);
    });
    Operands::recompute_scores(block, seen, queries, Cols * W, multiplier, scores);
  }

  // Probs overwrite the scores.
  static void keep_probs(const Block&, const VecF (&prob)[cell], float* scores, float* line, int lane) {
    store(scores + (line - scores) / cell + lane, to_cells(prob[0], prob[1]));
  }

  template <int Cols, class Visibility>
  static void accumulate(Block& block, const SeenKeys& seen, const float* probs, const VecF (&rescale)[Cols],
                         float* out, const Visibility& visibility) {
    if (!block.joined) block.splits_values = join_values(block);
    block.joined = true;
    multiply_values<Cols>(block, seen, probs, rescale, out);
    block.later_values = block.later_keys = {};
    const auto prob = [&](int key, int c) {
      const VecF cells = load(probs + (key / cell * Cols + c) * W);
      return key % cell == 0 ? first_of(cells) : second_of(cells);
    };
    if (!block.splits_values) Operands::template add_unsplittable_values<Cols>(block, seen, prob, out, visibility);
  }

 private:
  template <int Cols>
  [[gnu::noinline]] static void multiply_values(const Block& block, const SeenKeys& seen, const float* probs,
                                                const VecF (&rescale)[Cols], float* out) {
    const std::int64_t stride = block.memory.value_stride, depth = ceil_div(seen.count, cell);
    const Transposed<float> values{block.memory.values + seen.skipped / cell * stride, stride};
    const RightOperand<float> right{probs, Cols * W, depth};
    fetch_during(block.later_keys, ceil_div(block.value_dim, TileRows), depth, [&](auto fetches) {
      add_products_to<TileRows, Cols, PairUnit>(values, block.value_dim, right, rescale, out, fetches);
    });
  }

  // Returns false if some value cannot be split.
  [[gnu::noinline]] static bool join_values(const Block& block) {
    const std::int64_t value_dim = block.value_dim;
    if constexpr (exact)
      if (join_as_they_are(block)) return true;
    MaskF found = broadcast(0.0f) < broadcast(0.0f);
    for (int key = 0; key < block.count; key += cell)
      for (std::int64_t d = 0; d < value_dim; d += W) {
        VecF x[cell];
        for (int i = 0; i < cell; ++i) {
          const E* value = block.values + (key + i) * block.value_stride + d;
          x[i] = key + i < block.count ? load_up_to(value, value_dim - d) : broadcast(0.0f);
          const MaskF lanes = Operands::unsplittable(x[i]);
          found = found | lanes;
          x[i] = Operands::clear(lanes, x[i]);
        }
        store(block.memory.values + key / cell * block.memory.value_stride + d, to_cells(x[0], x[1]));
      }
    return !any(found);
  }

  // Copies the bits of bfloat16 values. Returns false, after copying everything, if some value cannot be split.
  static bool join_as_they_are(const Block& block) {
    const std::int64_t value_dim = block.value_dim;
    CellSizes sizes;
    for (int key = 0; key < block.count; key += cell) {
      const E* first = block.values + key * block.value_stride;
      const E* second = key + 1 < block.count ? first + block.value_stride : nullptr;
      float* to = block.memory.values + key / cell * block.memory.value_stride;
      const auto join = [&](std::int64_t d, std::int64_t n) {
        const VecF a = load_cells(first + d, n), b = second ? load_cells(second + d, n) : broadcast(0.0f);
        sizes.include(a);
        sizes.include(b);
        VecF low, high;
        join_cells(a, b, low, high);
        store(to + d, low);
        if (n > W) store(to + d + W, high);
      };
      const std::int64_t whole = value_dim / (cell * W) * (cell * W);
      for (std::int64_t d = 0; d < whole; d += cell * W) join(d, cell * W);
      if (whole < value_dim) join(whole, value_dim - whole);
    }
    return sizes.within(0x1p-100f);
  }
};

}  // namespace selfattn::SELFATTN_ISA
