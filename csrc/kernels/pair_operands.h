// Operands of tile kernels whose units multiply bfloat16 in pairs (engine_fma.h defines the engine interface).
//
// Such a unit multiplies two adjacent numbers at once, so operands are stored in cells of two: queries and keys in
// pairs of dims, probs and values in pairs of keys. Keys keep their layout. Values are packed once per block. AMX needs
// them transposed; AVX512_BF16 does not.
//
// A number that bfloat16 cannot represent is split: x = x0 + x1 + ... Each split term is the remainder of x after the
// split terms before it, rounded to the nearest bfloat16. Split terms are stored in `SplitTerms` planes, one after
// another. A product is the sum of the products of split terms i and j with i + j < SplitTerms. Two split terms carry
// 16 bits of the significand, three carry all 24.
//
// Some numbers are not split: NaN, Inf, numbers beyond the largest bfloat16, and numbers whose split terms could be
// subnormal. The unit multiplies 0 in their place. FMA multiplies them afterwards: scores of queries or keys that hold
// such a number are recomputed one by one, and such values are multiplied by probs and added to the outputs. All other
// scores and outputs stay as they are, so the bits of results do not depend on the contents of hidden keys. bfloat16
// queries and keys are an exception: the unit multiplies them as they are, and only scores that became NaN are
// recomputed.
#pragma once
#include "kernels/element_type.h"
#include "kernels/engine_fma.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/scratch.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

template <class A, class B>
constexpr bool same_type = false;
template <class A>
constexpr bool same_type<A, A> = true;

// E: the type of queries, keys and values in memory.
template <class E, int SplitTerms>
struct PairOperands {
  using Real = float;
  static constexpr int W = VecF::width;
  static constexpr bool packs = true;
  static constexpr DType operands = dtype_of(E());
  static constexpr int cell = 2;
  // Nothing to split: every bfloat16 is a single exact split term.
  static constexpr bool exact = SplitTerms == 1 && same_type<E, BFloat>;

  // Rows of cells are padded to whole vectors.
  static constexpr std::int64_t whole(std::int64_t count) { return round_up(count, W); }
  static constexpr std::int64_t row_cells(std::int64_t count) { return whole(ceil_div(count, cell)); }
  static constexpr std::int64_t key_rows(std::int64_t keys) { return round_up(keys, cell * W); }
  static constexpr std::int64_t dim_rows(std::int64_t value_dim) { return whole(value_dim); }
  // Each query has its planes, then a flag that says whether the query holds a number that cannot be split.
  static constexpr std::int64_t query_cells(std::int64_t head_dim) { return SplitTerms * row_cells(head_dim) + 1; }

  struct Memory {
    float* keys;                            // [split term][key][cells of head_dim]
    float* values;                          // [split term][dim][cells of keys]; in PairEngine [cells of keys][dim]
    unsigned char* unsplittable;            // per key: whether it holds a number that cannot be split
    std::int64_t key_stride, value_stride;  // cells from one row to the next
    std::int64_t key_plane, value_plane;    // cells from one split term's plane to the next

    Memory(Carver& carver, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : key_stride(row_cells(head_dim)),
          value_stride(row_cells(key_block)),
          key_plane(key_rows(key_block) * key_stride),
          value_plane(dim_rows(value_dim) * value_stride) {
      keys = carver.take<float>(SplitTerms * key_plane);
      values = carver.take<float>(SplitTerms * value_plane);
      unsplittable = carver.take<unsigned char>(key_block);
    }
  };

  struct Block {
    std::int64_t head_dim, value_dim;
    Memory memory;
    const E* keys;  // the original keys and values, not packed
    std::int64_t key_stride;
    const E* values;
    std::int64_t value_stride;
    const Scoring* scoring;
    bool splits_keys, splits_values;  // whether every key (every value) of the block can be split
  };

  // The lanes whose number cannot be split: NaN, numbers beyond the largest bfloat16, and numbers so small that split
  // terms could be subnormal (float16 has no such numbers).
  static MaskF unsplittable(VecF x) {
    const VecF size = abs(x);
    const MaskF unbounded = is_nan(x) | (broadcast(0x1.fep127f) < size);
    if constexpr (same_type<E, Half>) return unbounded;
    return unbounded | ((broadcast(0.0f) < size) & (size < broadcast(0x1p-100f)));
  }

  static VecF clear(MaskF lanes, VecF x) { return select(lanes, broadcast(0.0f), x); }

  // Stores the split terms of up to 32 adjacent numbers. Returns a mask of the lanes i for which number i or number
  // i + 16 cannot be split.
  static MaskF store_split_terms(const E* p, std::int64_t n, float* cells, std::int64_t plane) {
    if constexpr (exact) {
      store(cells, load_cells(p, n));
      return broadcast(0.0f) < broadcast(0.0f);
    } else {
      VecF x[2] = {load_up_to(p, n), n > W ? load_up_to(p + W, n - W) : broadcast(0.0f)};
      const MaskF lanes[2] = {unsplittable(x[0]), unsplittable(x[1])};
      for (int i = 0; i < 2; ++i) x[i] = clear(lanes[i], x[i]);
      for (int t = 0; t < SplitTerms; ++t) {
        VecF term[2];
        for (int i = 0; i < 2; ++i) {
          term[i] = round_to_bfloat(x[i]);
          x[i] = x[i] - term[i];
        }
        store(cells + t * plane, to_cells_in_order(term[0], term[1]));
      }
      return lanes[0] | lanes[1];
    }
  }

  static void pack_queries(const Row* rows, int count, std::int64_t head_dim, int lanes, float* queries) {
    const std::int64_t depth = row_cells(head_dim), plane = depth * lanes;
    float* flags = queries + SplitTerms * plane;
    for (int l = 0; l < lanes; ++l) flags[l] = 0;
    float split[SplitTerms][W];
    for (int t = 0; t < SplitTerms; ++t)
      rows_to_columns(queries + t * plane, lanes, lanes, depth, [&](int row, std::int64_t c, int) {
        if (row >= count) return broadcast(0.0f);
        const E* query = static_cast<const E*>(rows[row].query);
        if (any(store_split_terms(query + cell * c, head_dim - cell * c, split[0], W))) flags[row] = 1;
        return load(split[t]);
      });
  }

  static Block original(const RowBlock& rows, const KeyBlock& keys, const Memory& memory) {
    return {rows.head_dim,
            rows.value_dim,
            memory,
            static_cast<const E*>(keys.keys),
            keys.key_stride,
            static_cast<const E*>(keys.values),
            keys.value_stride,
            &rows.scoring,
            true,
            true};
  }

  static Block prepare(const RowBlock& rows, const KeyBlock& keys, const Memory& memory) {
    Block block = original(rows, keys, memory);
    pack_keys(block, keys.count);
    block.splits_values = pack_values(block.values, keys.value_stride, keys.count, rows.value_dim, memory);
    return block;
  }

  static void pack_keys(Block& block, int count) {
    const Memory& memory = block.memory;
    for (int key = 0; key < count; ++key) {
      MaskF found = broadcast(0.0f) < broadcast(0.0f);
      for (std::int64_t c = 0; c < memory.key_stride; c += W)
        found = found | store_split_terms(block.keys + key * block.key_stride + cell * c, block.head_dim - cell * c,
                                          memory.keys + key * memory.key_stride + c, memory.key_plane);
      memory.unsplittable[key] = any(found) ? 1 : 0;
      block.splits_keys = block.splits_keys && memory.unsplittable[key] == 0;
    }
  }

  // Recomputes the scores of all keys and rows that hold a number that cannot be split, and all scores that became NaN.
  // Skips hidden keys. A NaN may be wrong: the unit may have multiplied infinity by a subnormal number that it treats
  // as 0, or products of split terms may be infinities of opposite sign.
  static void recompute_scores(const Block& block, const SeenKeys& seen, const StripQueries<float>& queries, int lanes,
                               float multiplier, float* scores) {
    const std::int64_t head_dim = block.head_dim;
    MaskF undefined = broadcast(0.0f) < broadcast(0.0f);
    for (int i = 0; i < seen.count * lanes; i += W) undefined = undefined | is_nan(load(scores + i));
    if (exact && !any(undefined)) return;
    const float* flags = queries.packed + SplitTerms * row_cells(head_dim) * lanes;
    const auto splits = [&](int row) { return exact || (block.splits_keys && flags[row] == 0); };
    for (int row = 0; row < queries.count; ++row) {
      if (!any(undefined) && splits(row)) continue;
      const E* query = static_cast<const E*>(queries.rows[row].query);
      for (int key = 0; key < seen.count; ++key) {
        const int index = seen.skipped + key;
        float& score = scores[key * lanes + row];
        const bool split = exact || (block.memory.unsplittable[index] == 0 && flags[row] == 0);
        if ((split && score == score) || hides<float>(queries.rows[row], *block.scoring, seen.first + key)) continue;
        float sum = 0;
        for (std::int64_t d = 0; d < head_dim; ++d)
          sum = __builtin_fmaf(widen(query[d]), widen(block.keys[index * block.key_stride + d]), sum);
        score = sum * multiplier;
      }
    }
  }

  // Adds values that cannot be split to the outputs of the rows that see them. prob(key, c): vector c of the probs of a
  // key.
  template <int Cols, class Prob, class Visibility>
  static void add_unsplittable_values(const Block& block, const SeenKeys& seen, Prob prob, float* out,
                                      const Visibility& visibility) {
    const auto values_of = [&](int key) { return block.values + (seen.skipped + key) * block.value_stride; };
    const auto skips = [&](int key) { return splits(values_of(key), block.value_dim) || visibility.hides(key); };
    int key = 0;
    while (key < seen.count && skips(key)) ++key;
    if (key == seen.count) return;
    const ScoreTile<float> tile = visibility.described();
    for (; key < seen.count; ++key) {
      if (skips(key)) continue;
      const E* values = values_of(key);
      for (std::int64_t dim = 0; dim < block.value_dim; ++dim) {
        const VecF value = broadcast(widen(values[dim]));
        if (!any(unsplittable(value))) continue;
        for (int c = 0; c < Cols; ++c) {
          float* o = out + (dim * Cols + c) * W;
          store(o, select(visible<AcrossRows>(tile, key, c * W), fma(value, prob(key, c), load(o)), load(o)));
        }
      }
    }
  }

 private:
  static bool splits(const E* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += W)
      if (any(unsplittable(load_up_to(values + i, count - i)))) return false;
    return true;
  }

  // Packs pairs of keys into cells for each dim, 32 keys x 16 dims at a time. Returns false if some value cannot be
  // split.
  static bool pack_values(const E* values, std::int64_t stride, int count, std::int64_t value_dim,
                          const Memory& memory) {
    MaskF found = broadcast(0.0f) < broadcast(0.0f);
    for (std::int64_t d = 0; d < value_dim; d += W)
      for (int key = 0; key < count; key += cell * W) {
        VecF square[SplitTerms][W];
        for (int i = 0; i < W; ++i) {
          VecF x[cell];
          for (int j = 0; j < cell; ++j) {
            const int k = key + cell * i + j;
            x[j] = k < count ? load_up_to(values + k * stride + d, value_dim - d) : broadcast(0.0f);
            const MaskF lanes = unsplittable(x[j]);
            found = found | lanes;
            x[j] = clear(lanes, x[j]);
          }
          for (int t = 0; t < SplitTerms; ++t) {
            square[t][i] = to_cells(x[0], x[1]);
            x[0] = x[0] - first_of(square[t][i]);
            x[1] = x[1] - second_of(square[t][i]);
          }
        }
        for (int t = 0; t < SplitTerms; ++t) {
          transpose(square[t]);
          float* to = memory.values + t * memory.value_plane + d * memory.value_stride + key / cell;
          for (int i = 0; i < W; ++i) store(to + i * memory.value_stride, square[t][i]);
        }
      }
    return !any(found);
  }
};

}  // namespace selfattn::SELFATTN_ISA
