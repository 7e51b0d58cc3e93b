// A tile kernel's two products with AMX (engine_fma.h defines the engine interface).
//
//   scores^T    left operand: keys, not transposed; right operand: packed queries
//   out^T       left operand: transposed values; right operand: probs
#pragma once
#include "kernels/amx_matmul.h"
#include "kernels/pair_operands.h"

namespace selfattn::SELFATTN_ISA {

template <class E, int SplitTerms>
struct AmxEngine : PairOperands<E, SplitTerms> {
  using Operands = PairOperands<E, SplitTerms>;
  using Operands::cell;
  using Operands::row_cells;
  using Operands::W;
  static constexpr const char* unit = "amx";
  static constexpr int alignment = cell * W;
  static constexpr bool scales = false;

  struct Memory : Operands::Memory {
    float* probs;  // [split term][cells of keys][lanes]
    std::int64_t prob_plane;

    Memory(Carver& carver, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : Operands::Memory(carver, key_block, head_dim, value_dim), prob_plane(row_cells(key_block) * 2 * W) {
      probs = carver.take<float>(SplitTerms * prob_plane);
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

  // Computes scores without the multiplier.
  template <int Cols>
  [[gnu::noinline]] static void score(const Block& block, const SeenKeys& seen, const StripQueries<float>& queries,
                                      float, float* scores) {
    const std::int64_t depth = row_cells(block.head_dim), stride = block.memory.key_stride;
    const CellMatrix packed{queries.packed, Cols * W, depth * Cols * W};
    for (int key = 0; key < seen.count; key += 2 * W) {
      const CellMatrix keys{block.memory.keys + (seen.skipped + key) * stride, stride, block.memory.key_plane};
      multiply_rows_of<Cols>(seen.count - key, keys, packed, depth, scores + key * Cols * W, /*adds=*/false);
    }
    Operands::recompute_scores(block, seen, queries, Cols * W, 1.0f, scores);
  }

  static void keep_probs(const Block& block, const VecF (&prob)[cell], float* scores, float* line, int lane) {
    VecF rest[cell] = {prob[0], prob[1]};
    for (int t = 0; t < SplitTerms; ++t) {
      const VecF cells = to_cells(rest[0], rest[1]);
      store(block.probs + t * block.prob_plane + (line - scores) / cell + lane, cells);
      rest[0] = rest[0] - first_of(cells);
      rest[1] = rest[1] - second_of(cells);
    }
  }

  template <int Cols, class Visibility>
  static void accumulate(const Block& block, const SeenKeys& seen, const float*, const VecF (&rescale)[Cols],
                         float* out, const Visibility& visibility) {
    rescale_sums<Cols>(rescale, block.value_dim, out);
    // Pads the probs with 0 up to the end of the last tile.
    const std::int64_t used = ceil_div(seen.count, cell), depth = row_cells(seen.count);
    for (int t = 0; t < SplitTerms; ++t)
      for (std::int64_t i = used * Cols * W; i < depth * Cols * W; i += W)
        store(block.probs + t * block.prob_plane + i, broadcast(0.0f));
    multiply_values<Cols>(block, seen, depth, out);
    const auto prob = [&](int key, int c) {
      VecF sum = broadcast(0.0f);
      for (int t = SplitTerms - 1; t >= 0; --t) {
        const VecF cells = load(block.probs + t * block.prob_plane + (key / cell * Cols + c) * W);
        sum = sum + (key % cell == 0 ? first_of(cells) : second_of(cells));
      }
      return sum;
    };
    if (!block.splits_values) Operands::template add_unsplittable_values<Cols>(block, seen, prob, out, visibility);
  }

 private:
  // Multiplies the outputs of earlier blocks by `rescale`. Skips this if no maximum has changed, which is usual after
  // the first few blocks.
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
                                                float* out) {
    const std::int64_t stride = block.memory.value_stride, value_dim = block.value_dim;
    const CellMatrix probs{block.probs, Cols * W, block.prob_plane};
    for (std::int64_t dim = 0; dim < value_dim; dim += 2 * W) {
      const CellMatrix values{block.memory.values + dim * stride + seen.skipped / cell, stride,
                              block.memory.value_plane};
      multiply_rows_of<Cols>(value_dim - dim, values, probs, depth, out + dim * Cols * W, /*adds=*/true);
    }
  }

  // Multiplies two tiles of rows, or one if at most 16 rows are left.
  template <int Cols>
  static void multiply_rows_of(std::int64_t left, const CellMatrix& a, const CellMatrix& b, std::int64_t depth,
                               float* sums, bool adds) {
    if (left > W)
      multiply<2, Cols>(a, b, depth, sums, adds);
    else
      multiply<1, Cols>(a, b, depth, sums, adds);
  }

  template <int Rows, int Cols>
  static void multiply(const CellMatrix& a, const CellMatrix& b, std::int64_t depth, float* sums, bool adds) {
    if (adds)
      load_sums<Rows, Cols>(sums, Cols * W);
    else
      clear_sums<Rows, Cols>();
    const auto load_left = [&]<int Tile, int R>(int term, std::int64_t k) {
      load_tile<Tile>(a.data + term * a.plane + R * tile_rows * a.stride + k, a.stride);
    };
    multiply_cells<SplitTerms, Rows, Cols>(load_left, b, depth);
    store_sums<Rows, Cols>(sums, Cols * W);
  }
};

}  // namespace selfattn::SELFATTN_ISA
