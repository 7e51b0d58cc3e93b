// A tile kernel's two products with AMX (engine_fma.h says what an engine is).
//
//   scores^T: keys, as they stand, are the left operand, and queries the right one    out^T: values transposed, and
//   probs
//
// Sums stand in 2 x 2 tiles, 32 keys or dims by 32 rows: four products for four loads. The small products of split
// operands come first, so that they are added to each other before they meet the large ones.
#pragma once
#include "kernels/pair_operands.h"

namespace selfattn::SELFATTN_ISA {

template <class E, int Terms>
struct AmxEngine : PairOperands<E, Terms> {
  using Operands = PairOperands<E, Terms>;
  using Operands::cell;
  using Operands::row_cells;
  using Operands::W;
  static constexpr const char* unit = "amx";
  static constexpr int alignment = cell * W;
  static constexpr bool scales = false;

  struct Memory : Operands::Memory {
    float* probs;  // [term][cells of keys][lanes]
    std::int64_t prob_plane;

    Memory(Carver& carver, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : Operands::Memory(carver, key_block, head_dim, value_dim), prob_plane(row_cells(key_block) * 2 * W) {
      probs = carver.take<float>(Terms * prob_plane);
    }
  };

  struct Block : Operands::Block {
    float* probs;
    std::int64_t prob_plane;
  };

  static void start() { configure_tiles(); }
  static void stop() { release_tiles(); }

  static Block prepare(const RowBlock& rows, const KeyBlock& keys, const Memory& memory) {
    return {Operands::prepare(rows, keys, memory), memory.probs, memory.prob_plane};
  }

  // Scores without their multiplier.
  template <int Cols>
  [[gnu::noinline]] static void score(const Block& block, const SeenKeys& seen, const StripQueries<float>& queries,
                                      std::int64_t head_dim, std::int64_t, float, float* scores) {
    const std::int64_t depth = row_cells(head_dim), step = block.memory.key_step;
    const float* keys = block.memory.keys + seen.skipped * step;
    for (int key = 0; key < seen.count; key += 2 * W, keys += 2 * W * step)
      multiply_rows_of<Cols>(seen.count - key, keys, step, block.memory.key_plane, queries.packed, depth * Cols * W,
                             depth, scores + key * Cols * W, /*adds=*/false);
    Operands::mend_scores(block, seen, queries, head_dim, Cols * W, 1.0f, scores);
  }

  static void keep_probs(const Block& block, const VecF (&prob)[cell], float*, std::int64_t key, int lanes, int lane) {
    VecF rest[cell] = {prob[0], prob[1]};
    for (int t = 0; t < Terms; ++t) {
      const VecF cells = to_cells(rest[0], rest[1]);
      store(block.probs + t * block.prob_plane + key / cell * lanes + lane, cells);
      rest[0] = rest[0] - first_of(cells);
      rest[1] = rest[1] - second_of(cells);
    }
  }

  template <int Cols, class Tile>
  static void accumulate(const Block& block, const SeenKeys& seen, const float*, const VecF (&rescale)[Cols],
                         std::int64_t, std::int64_t value_dim, float* out, bool, Tile tile) {
    rescale_sums<Cols>(rescale, value_dim, out);
    // Keys up to the end of a tile have weight 0.
    const std::int64_t used = (seen.count + cell - 1) / cell, depth = row_cells(seen.count);
    for (int t = 0; t < Terms; ++t)
      for (std::int64_t i = used * Cols * W; i < depth * Cols * W; i += W)
        store(block.probs + t * block.prob_plane + i, broadcast(0.0f));
    multiply_values<Cols>(block, seen, depth, value_dim, out);
    const auto prob = [&](int key, int c) {
      VecF sum = broadcast(0.0f);
      for (int t = Terms - 1; t >= 0; --t) {
        const VecF cells = load(block.probs + t * block.prob_plane + (key / cell * Cols + c) * W);
        sum = sum + (key % cell == 0 ? first_of(cells) : second_of(cells));
      }
      return sum;
    };
    if (!block.carries_values) Operands::template join_values<Cols>(block, seen, prob, value_dim, out, tile());
  }

 private:
  // Most maxima do not move any more after a few blocks.
  template <int Cols>
  static void rescale_sums(const VecF (&rescale)[Cols], std::int64_t value_dim, float* out) {
    bool moved = false;
    for (const VecF& factor : rescale) moved = moved || !all(factor == broadcast(1.0f));
    if (!moved) return;
    for (std::int64_t dim = 0; dim < value_dim; ++dim)
      for (int c = 0; c < Cols; ++c, out += W) store(out, load(out) * rescale[c]);
  }

  template <int Cols>
  [[gnu::noinline]] static void multiply_values(const Block& block, const SeenKeys& seen, std::int64_t depth,
                                                std::int64_t value_dim, float* out) {
    const std::int64_t step = block.memory.value_step;
    const float* values = block.memory.values + seen.skipped / cell;
    for (std::int64_t dim = 0; dim < value_dim; dim += 2 * W, values += 2 * W * step)
      multiply_rows_of<Cols>(value_dim - dim, values, step, block.memory.value_plane, block.probs, block.prob_plane,
                             depth, out + dim * Cols * W, /*adds=*/true);
  }

  // One or two tiles of rows, as many as `left` rows need.
  template <int Cols>
  static void multiply_rows_of(std::int64_t left, const float* a, std::int64_t a_step, std::int64_t a_plane,
                               const float* b, std::int64_t b_plane, std::int64_t depth, float* sums, bool adds) {
    if (left > W)
      multiply<2, Cols>(a, a_step, a_plane, b, b_plane, depth, sums, adds);
    else
      multiply<1, Cols>(a, a_step, a_plane, b, b_plane, depth, sums, adds);
  }

  // Tiles 0-3: sums. 4, 5: left operands. 6, 7: right operands.
  template <int Rows, int Cols>
  static void multiply(const float* a, std::int64_t a_step, std::int64_t a_plane, const float* b, std::int64_t b_plane,
                       std::int64_t depth, float* sums, bool adds) {
    constexpr int lanes = Cols * W;
    each_sum<Rows, Cols>([&]<int R, int C>() {
      if (adds)
        load_tile<2 * R + C>(sums + R * W * lanes + C * W, lanes);
      else
        clear_tile<2 * R + C>();
    });
    for (int order = Terms - 1; order >= 0; --order)
      for (int i = order; i >= 0; --i) {
        const float* left = a + i * a_plane;
        const float* right = b + (order - i) * b_plane;
        for (std::int64_t k = 0; k < depth; k += W) {
          load_tile<4>(left + k, a_step);
          if constexpr (Rows > 1) load_tile<5>(left + W * a_step + k, a_step);
          load_tile<6>(right + k * lanes, lanes);
          if constexpr (Cols > 1) load_tile<7>(right + k * lanes + W, lanes);
          each_sum<Rows, Cols>([&]<int R, int C>() { multiply_tiles<2 * R + C, 4 + R, 6 + C>(); });
        }
      }
    each_sum<Rows, Cols>([&]<int R, int C>() { store_tile<2 * R + C>(sums + R * W * lanes + C * W, lanes); });
  }

  template <int Rows, int Cols, class Use>
  static void each_sum(Use use) {
    use.template operator()<0, 0>();
    if constexpr (Cols > 1) use.template operator()<0, 1>();
    if constexpr (Rows > 1) use.template operator()<1, 0>();
    if constexpr (Rows > 1 && Cols > 1) use.template operator()<1, 1>();
  }
};

}  // namespace selfattn::SELFATTN_ISA
