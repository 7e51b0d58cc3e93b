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

// The row kernel's dot products of queries and keys. These are bfloat16, so the products of pairs are exact. The sums
// of values use FMA instead.
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

// E: the type of the operands in memory. Each number is rounded to one bfloat16.
template <class E, int TileRows>
struct PairEngine : PairOperands<E, 1> {
  using Operands = PairOperands<E, 1>;
  using Block = typename Operands::Block;
  using Operands::cell;
  using Operands::W;
  static constexpr const char* unit = "bfloat16 pairs";
  static constexpr int alignment = cell;
  static constexpr bool scales = true;

  static void start() {}
  static void stop() {}

  template <int Cols>
  [[gnu::noinline]] static void score(const Block& block, const SeenKeys& seen, const StripQueries<float>& queries,
                                      std::int64_t head_dim, float multiplier, float* scores) {
    const std::int64_t step = block.memory.key_step;
    const RowMajor<float> keys{block.memory.keys + seen.skipped * step, step};
    store_products<TileRows, Cols, PairUnit>(keys, seen.count, queries.packed, ceil_div(head_dim, cell), multiplier,
                                             scores);
    Operands::recompute_scores(block, seen, queries, head_dim, Cols * W, multiplier, scores);
  }

  // Probs overwrite the scores.
  static void keep_probs(const Block&, const VecF (&prob)[cell], float* scores, float* line, int lane) {
    store(scores + (line - scores) / cell + lane, to_cells(prob[0], prob[1]));
  }

  template <int Cols, class Tile>
  static void accumulate(const Block& block, const SeenKeys& seen, const float* probs, const VecF (&rescale)[Cols],
                         std::int64_t value_dim, float* out, bool, Tile tile) {
    multiply_values<Cols>(block, seen, probs, rescale, value_dim, out);
    const auto prob = [&](int key, int c) {
      const VecF cells = load(probs + (key / cell * Cols + c) * W);
      return key % cell == 0 ? first_of(cells) : second_of(cells);
    };
    if (!block.splits_values)
      Operands::template add_unsplittable_values<Cols>(block, seen, prob, value_dim, out, tile());
  }

 private:
  template <int Cols>
  [[gnu::noinline]] static void multiply_values(const Block& block, const SeenKeys& seen, const float* probs,
                                                const VecF (&rescale)[Cols], std::int64_t value_dim, float* out) {
    multiply_rows<TileRows, Cols, PairUnit>(
        RowMajor<float>{block.memory.values + seen.skipped / cell, block.memory.value_step}, value_dim, probs, Cols * W,
        ceil_div(seen.count, cell), [&](std::int64_t dim, const auto& sums) {
          float* o = out + dim * Cols * W;
          for (const auto& row : sums)
            for (int c = 0; c < Cols; ++c, o += W) store(o, fma(load(o), rescale[c], row[c]));
        });
  }
};

}  // namespace selfattn::SELFATTN_ISA
