// A tile kernel's two products with dot products of bfloat16 pairs (engine_fma.h says what an engine is).
//
// A product multiplies two neighbours at once, so that both operands come in cells of two: queries and keys in pairs of
// dims, probs and values in pairs of keys. Keys are copied as they stand, values are transposed, both once per block;
// numbers that are float32 in memory are rounded on the way.
//
// Values that are not finite enter the product as 0, so that 0 * NaN cannot reach a row that does not see them, and
// join the rows that do afterwards: a result has the same bits whatever hidden keys hold.
#pragma once
#include "kernels/element_type.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/tile_matmul.h"

namespace selfattn::SELFATTN_ISA {

struct PairUnit {
  using Real = float;
  static VecF add_product(VecF a, VecF b, VecF sum) { return add_products(a, b, sum); }
};

inline VecF load_cells(const float* p, std::int64_t n) {
  const VecF high = n > VecF::width ? load_up_to(p + VecF::width, n - VecF::width) : broadcast(0.0f);
  return to_cells_in_order(load_up_to(p, n), high);
}

// E: the type of queries, keys and values in memory.
template <class E, int TileRows>
struct PairEngine {
  using Real = float;
  static constexpr int W = VecF::width;
  static constexpr const char* name = "tile of bfloat16 pairs";
  static constexpr DType operands = dtype_of(E());
  static constexpr int cell = 2;

  static constexpr std::int64_t cells(std::int64_t count) { return (count + cell - 1) / cell; }
  // Rows of cells in memory are whole vectors.
  static constexpr std::int64_t row_cells(std::int64_t count) { return (cells(count) + W - 1) / W * W; }

  struct Memory {
    float* keys;    // [key][cells of head_dim]
    float* values;  // [dim][cells of keys]
    std::int64_t key_step, value_step;

    Memory(Carver& carver, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : key_step(row_cells(head_dim)), value_step(row_cells(key_block)) {
      keys = carver.take<float>(key_block * key_step);
      values = carver.take<float>((value_dim + W - 1) / W * W * value_step);
    }
  };

  struct Block {
    Memory memory;
    const E* values;  // as they stand
    std::int64_t value_step;
    bool finite;
  };

  static std::int64_t query_cells(std::int64_t head_dim) { return cells(head_dim); }

  static void pack_queries(const Row* rows, int count, std::int64_t head_dim, int lanes, float* queries) {
    rows_to_columns(queries, lanes, lanes, cells(head_dim), [&](int row, std::int64_t c, int) {
      if (row >= count) return broadcast(0.0f);
      return load_cells(static_cast<const E*>(rows[row].query) + cell * c, head_dim - cell * c);
    });
  }

  static Block prepare(const RowBlock& rows, const KeyBlock& keys, const Memory& memory) {
    const E* key = static_cast<const E*>(keys.keys);
    for (int r = 0; r < keys.count; ++r, key += keys.key_step)
      for (std::int64_t c = 0; c < memory.key_step; c += W)
        store(memory.keys + r * memory.key_step + c, load_cells(key + cell * c, rows.head_dim - cell * c));
    const E* values = static_cast<const E*>(keys.values);
    const bool finite = pack_values(values, keys.value_step, keys.count, rows.value_dim, memory);
    return {memory, values, keys.value_step, finite};
  }

  template <int Cols>
  [[gnu::noinline]] static void score(const Block& block, const SeenKeys& seen, const float* queries,
                                      std::int64_t head_dim, std::int64_t, float multiplier, float* scores) {
    const std::int64_t step = block.memory.key_step;
    multiply_rows<TileRows, Cols, PairUnit>(RowMajor<float>{block.memory.keys + seen.skipped * step, step}, seen.count,
                                            queries, Cols * W, cells(head_dim),
                                            [&](std::int64_t key, const auto& sums) {
                                              float* score = scores + key * Cols * W;
                                              for (const auto& row : sums)
                                                for (int c = 0; c < Cols; ++c, score += W)
                                                  store(score, row[c] * broadcast(multiplier));
                                            });
  }

  static void keep_probs(const VecF (&prob)[cell], float* probs) { store(probs, to_cells(prob[0], prob[1])); }

  template <int Cols, class Tile>
  static void accumulate(const Block& block, const SeenKeys& seen, const float* probs, const VecF (&rescale)[Cols],
                         std::int64_t, std::int64_t value_dim, float* out, bool, Tile tile) {
    multiply_values<Cols>(block.memory, seen, probs, rescale, value_dim, out);
    if (!block.finite) join_infinite<Cols>(block, seen, probs, value_dim, out, tile());
  }

 private:
  // Cells of keys per dim, 32 keys of 16 dims at a time. False: there was a value that is not finite.
  static bool pack_values(const E* values, std::int64_t step, int count, std::int64_t value_dim, const Memory& memory) {
    const VecF zero = broadcast(0.0f);
    MaskF infinite = zero < zero;
    for (std::int64_t d = 0; d < value_dim; d += W)
      for (int key = 0; key < count; key += cell * W) {
        VecF square[W];
        for (int i = 0; i < W; ++i) {
          VecF value[cell];
          for (int j = 0; j < cell; ++j) {
            const int k = key + cell * i + j;
            value[j] = k < count ? load_up_to(values + k * step + d, value_dim - d) : zero;
            const MaskF bad = is_nan(value[j] * zero);
            infinite = infinite | bad;
            value[j] = select(bad, zero, value[j]);
          }
          square[i] = to_cells(value[0], value[1]);
        }
        transpose(square);
        for (int i = 0; i < W; ++i) store(memory.values + (d + i) * memory.value_step + key / cell, square[i]);
      }
    return !any(infinite);
  }

  template <int Cols>
  [[gnu::noinline]] static void multiply_values(const Memory& memory, const SeenKeys& seen, const float* probs,
                                                const VecF (&rescale)[Cols], std::int64_t value_dim, float* out) {
    multiply_rows<TileRows, Cols, PairUnit>(RowMajor<float>{memory.values + seen.skipped / cell, memory.value_step},
                                            value_dim, probs, Cols * W, cells(seen.count),
                                            [&](std::int64_t dim, const auto& sums) {
                                              float* o = out + dim * Cols * W;
                                              for (const auto& row : sums)
                                                for (int c = 0; c < Cols; ++c, o += W)
                                                  store(o, fma(load(o), rescale[c], row[c]));
                                            });
  }

  template <int Cols>
  static void join_infinite(const Block& block, const SeenKeys& seen, const float* probs, std::int64_t value_dim,
                            float* out, const ScoreTile<float>& tile) {
    const VecF zero = broadcast(0.0f);
    for (int key = 0; key < seen.count; ++key) {
      const E* values = block.values + (seen.skipped + key) * block.value_step;
      for (std::int64_t dim = 0; dim < value_dim; ++dim) {
        const VecF value = broadcast(widen(values[dim]));
        if (!any(is_nan(value * zero))) continue;
        for (int c = 0; c < Cols; ++c) {
          const VecF cells = load(probs + (key / cell * Cols + c) * W);
          const VecF prob = key % cell == 0 ? first_of(cells) : second_of(cells);
          float* o = out + (dim * Cols + c) * W;
          store(o, select(visible<AcrossRows>(tile, key, c * W), fma(value, prob, load(o)), load(o)));
        }
      }
    }
  }
};

}  // namespace selfattn::SELFATTN_ISA
