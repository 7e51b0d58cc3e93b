// Attention for few query rows and many keys (decode). Vectors of scores run along keys. In the products, vectors run
// along head_dim (row_products.h) and value_dim (row_values.h).
#pragma once
#include "kernels/element_type.h"
#include "kernels/kernel_set.h"
#include "kernels/row_products.h"
#include "kernels/score_terms.h"
#include "kernels/softmax.h"

namespace selfattn::SELFATTN_ISA {

// The parameters are those of RowProducts, then the class of the products: RowProducts, or one with the same members.
template <class T, int MaxSums, class E = T, class Dots = FmaDots<T, E>,
          class Products = RowProducts<T, MaxSums, E, Dots>>
struct RowAttention {
  static_assert(steps_elements<E>);
  using Memory = typename Products::Memory;
  static constexpr int W = Vec<T>::width;

  static std::size_t scratch_bytes(int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim) {
    return Memory(nullptr, rows, key_block, head_dim, value_dim).bytes;
  }

  static void begin(const RowBlock& block) noexcept {
    const Memory s(block);
    for (int r = 0; r < block.count; ++r) {
      const Row& row = block.rows[r];
      if (!block.resumes) start_softmax(row.sink, static_cast<T*>(block.row_max)[r], static_cast<T*>(block.row_sum)[r]);
      const typename Dots::Q* query = static_cast<const typename Dots::Q*>(row.query);
      T* loaded = s.queries + r * s.query_stride;
      for (std::int64_t d = 0; d < block.head_dim; d += Dots::elements, loaded += W)
        store(loaded, Dots::load_query(query + d, block.head_dim - d));
      Products::prepare(block, s, r);
      start_out(block, s, r);
    }
  }

  static void start_out(const RowBlock& block, const Memory& s, int row) {
    for (std::int64_t d = 0; d < s.out_stride; d += W) store(s.out + row * s.out_stride + d, broadcast(T(0)));
    if (!block.resumes) return;
    const T* out = static_cast<const T*>(block.rows[row].out);
    for (std::int64_t d = 0; d < block.value_dim; d += W)
      Products::store_out(s, row, d, load_up_to(out + d, block.value_dim - d));
  }

  static void absorb(const RowBlock& block, const KeyBlock& keys) noexcept {
    const Memory s(block);
    const bool limited = limits(block, keys);
    ScoreTile<T> tile{.scores = s.scores,
                      .terms = nullptr,
                      .outer = block.count,
                      .lanes = static_cast<int>(Products::padded(keys.count)),
                      .stride = s.score_stride,
                      .limited = limited,
                      .limits = s.limits,
                      .rows = block.rows,
                      .num_rows = block.count,
                      .shares_terms = false,
                      .first_key = keys.first,
                      .num_keys = keys.count};
    describe_rows(tile, block.count);
    const Sight sight = has_terms(block.scoring) ? sight_of(tile, block.scoring) : Sight::everything;
    if (sight == Sight::nothing && !block.rows[0].scores) return;
    Products::score(block, s, keys);
    if constexpr (scaled<E>) change_scores(tile, [&](Vec<T> x, int, int l) { return x * load(keys.key_scales + l); });
    if (block.rows[0].relative) add_relative<AcrossKeys>(tile, static_cast<T>(block.scoring.multiplier));
    const bool hidden = complete_scores<AcrossKeys>(tile, block.scoring, sight);
    for (int r = 0; r < block.count; ++r) exponentiate(block, tile, r, s.rescale[r]);
    if constexpr (scaled<E>) change_scores(tile, [&](Vec<T> x, int, int l) { return x * load(keys.value_scales + l); });
    KeyBlock finite = keys;
    if ((limited || hidden) && !Products::finite_values(keys, block.value_dim) &&
        !replace_hidden(block, s, tile, finite)) {
      if (hidden) tile.terms = gather_terms<AcrossKeys>(tile, block.scoring, s.terms);
      return Products::Values::accumulate_visible(block, s, tile, keys);
    }
    Products::Values::accumulate(block, s, finite);
  }

  // Codes need no replacement, because they are finite. A scale that is not finite makes the weight not finite: the
  // weights have been multiplied by the scales.
  static bool replace_hidden(const RowBlock& block, const Memory& s, const ScoreTile<T>& tile, KeyBlock& keys) {
    if constexpr (scaled<E>)
      return false;
    else
      return Products::Values::replace_hidden(block, s, tile, keys);
  }

  // Whether some row does not see all lanes of the tile. Lanes that pad the last vector are beyond every row's end.
  static bool limits(const RowBlock& block, const KeyBlock& keys) {
    bool limited = keys.count % W != 0;
    for (int r = 0; r < block.count; ++r) {
      const Row& row = block.rows[r];
      limited = limited || row.key_begin > keys.first || row.key_end < keys.first + keys.count;
    }
    return limited;
  }

  // Replaces the scores of one row by probs.
  static void exponentiate(const RowBlock& block, const ScoreTile<T>& tile, int row, T& rescale) {
    T& row_max = static_cast<T*>(block.row_max)[row];
    T& row_sum = static_cast<T*>(block.row_sum)[row];
    T* scores = tile.scores + row * tile.stride;
    SoftmaxStep<T, 1> step;
    step.peak[0] = broadcast(row_max);
    softmax<AcrossKeys, 1>(
        ScoreLines<T>{scores, scores + tile.lanes, W}, step, [](Vec<T> score) { return score; },
        [&](const Vec<T>(&prob)[1], T* line, int) { store(line, prob[0]); });
    row_max = first_lane(step.peak[0]);
    rescale = first_lane(step.rescale[0]);
    row_sum = row_sum * rescale + reduce_sum(step.sum[0]);
  }

  static T first_lane(Vec<T> a) {
    T lanes[W];
    store(lanes, a);
    return lanes[0];
  }

  static void finish(const RowBlock& block) noexcept {
    use_out_type<T>(block.out_type, [&](auto element) { finish_as<decltype(element)>(block); });
  }

  template <class Out>
  static void finish_as(const RowBlock& block) {
    const Memory s(block);
    for (int r = 0; r < block.count; ++r) {
      const Vec<T> factor = output_factor(broadcast(static_cast<const T*>(block.row_sum)[r]), block.normalise);
      Out* out = static_cast<Out*>(block.rows[r].out);
      for (std::int64_t d = 0; d < block.value_dim; d += W)
        store_up_to(out + d, Products::load_out(s, r, d) * factor, block.value_dim - d);
    }
  }

  static constexpr AttendKernel kernel{"row",
                                       Dots::unit,
                                       dtype_of(typename Dots::Q()),
                                       dtype_of(E()),
                                       false,
                                       true,
                                       1,
                                       scratch_bytes,
                                       begin,
                                       absorb,
                                       finish,
                                       Products::widest};
};

}  // namespace selfattn::SELFATTN_ISA
