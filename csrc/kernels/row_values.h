// The row kernel's sums of values. Vectors run along value_dim.
#pragma once
#include "kernels/ahead.h"
#include "kernels/element_type.h"
#include "kernels/kernel_set.h"
#include "kernels/score_terms.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

template <class E>
inline const E* row_of(const void* const* rows, int j) {
  return static_cast<const E*>(rows[j]);
}

// The number of keys in a bunch: keys or values that are processed together. They stay in L1 while all rows and dims
// use them: 32 rows of 128 floats are 16 KiB.
constexpr int bunch_keys = 32;

struct ValueBunch {
  const void* const* values;
  int first_key;
  int count;

  ValueBunch(const KeyBlock& keys, int first)
      : values(keys.value_rows + first),
        first_key(first),
        count(keys.count - first < bunch_keys ? keys.count - first : bunch_keys) {}
};

// The factor by which a row's outputs are multiplied before a bunch's sums are added. The outputs are rescaled only for
// the first bunch of a key block.
template <class T>
inline Vec<T> rescale_of(const T* rescale, const ValueBunch& bunch, int row) {
  return broadcast(bunch.first_key == 0 ? rescale[row] : T(1));
}

template <class T>
inline void add_sum(T* out, Vec<T> rescale, Vec<T> sum) {
  store(out, fma(load(out), rescale, sum));
}

// Whether a row sees a key of the tile.
template <class T>
inline bool sees(const ScoreTile<T>& tile, int row, int key) {
  constexpr int W = Vec<T>::width;
  return any(visible<AcrossKeys>(tile, row, key / W * W) & (iota(T()) == broadcast(static_cast<T>(key % W))));
}

// MaxSums: how many vector accumulators fit in the registers together with their operands. E: type of values in memory.
template <class T, int MaxSums, class E>
struct FmaValues {
  static constexpr int W = Vec<T>::width;
  static constexpr int max_rows_at_once = W < 4 ? W : 4;

  // out = out * rescale + probs . values, one bunch of keys after another.
  template <class Memory>
  static void accumulate(const RowBlock& block, const Memory& s, const KeyBlock& keys) {
    for (int first = 0; first < keys.count; first += bunch_keys)
      accumulate_rows<max_rows_at_once>(block, s, ValueBunch(keys, first), 0);
  }

  // If a key is hidden from all rows and one of its values is not finite, its values are replaced by zeros. Returns
  // false if some row sees a value that is not finite.
  template <class Memory>
  static bool replace_hidden(const RowBlock& block, const Memory& s, const ScoreTile<T>& tile, KeyBlock& keys) {
    for (std::int64_t d = 0; d < block.value_dim; ++d) s.zeros[d] = E();
    for (int j = 0; j < keys.count + rows_ahead; ++j) {
      s.value_rows[j] = keys.value_rows[j];
      if (j >= keys.count || all_finite([&](int) { return row_of<E>(keys.value_rows, j); }, 1, block.value_dim))
        continue;
      if (!hides(tile, block.scoring, j)) return false;
      s.value_rows[j] = s.zeros;
    }
    keys.value_rows = s.value_rows;
    return true;
  }

  // Computes the same sums in the same order, but skips hidden keys instead of multiplying their values by 0.
  template <class Memory>
  static void accumulate_visible(const RowBlock& block, const Memory& s, const ScoreTile<T>& tile,
                                 const KeyBlock& keys) {
    for (int r = 0; r < block.count; ++r)
      for (std::int64_t dim = 0; dim < block.value_dim; dim += W)
        for (int first = 0; first < keys.count; first += bunch_keys) {
          const ValueBunch bunch(keys, first);
          Vec<T> sum = broadcast(T(0));
          for (int j = first; j < first + bunch.count; ++j) {
            if (!sees(tile, r, j)) continue;
            const Vec<T> value = load_up_to(row_of<E>(keys.value_rows, j) + dim, block.value_dim - dim);
            sum = fma(broadcast(s.scores[r * s.score_stride + j]), value, sum);
          }
          add_sum(s.out + r * s.out_stride + dim, rescale_of(s.rescale, bunch, r), sum);
        }
  }

 private:
  // Makes the compiler keep one base register and address the columns by offsets, instead of one register per column.
  static const E* one_base(const E* p) {
    asm("" : "+r"(p));
    return p;
  }

  // Processes `Rows` rows at a time, so that each value is loaded and widened once for all of these rows. For the
  // remaining rows, `Rows` is halved.
  template <int Rows, class Memory>
  static void accumulate_rows(const RowBlock& block, const Memory& s, const ValueBunch& bunch, int row) {
    constexpr int columns = MaxSums / Rows;
    for (; row + Rows <= block.count; row += Rows) accumulate_dims<Rows, columns>(block, s, bunch, row, 0);
    if constexpr (Rows > 1)
      if (row < block.count) accumulate_rows<Rows / 2>(block, s, bunch, row);
  }

  // Processes `Cols` vectors of dims at a time. For the remaining dims, `Cols` is halved.
  template <int Rows, int Cols, class Memory>
  static void accumulate_dims(const RowBlock& block, const Memory& s, const ValueBunch& bunch, int row,
                              std::int64_t dim) {
    const auto sum = [&](auto load_values) {
      // Only the last rows prefetch the next bunch. The others prefetch what they read, which costs next to nothing.
      const int ahead = row + Rows == block.count ? bunch_keys : 0;
      sum_values<Rows, Cols>(s, bunch, row, dim, ahead, load_values);
    };
    for (; block.value_dim - dim >= Cols * W; dim += Cols * W) sum([](const E* p, auto& x) { load_adjacent(p, x); });
    if constexpr (Cols > 1) {
      if (dim < block.value_dim) accumulate_dims<Rows, Cols / 2>(block, s, bunch, row, dim);
    } else if (dim < block.value_dim) {
      const int tail = static_cast<int>(block.value_dim - dim);
      sum([tail](const E* p, auto& x) { x[0] = load_partial(p, tail); });
    }
  }

  // load_values(p, x) loads two vectors; one if Cols is 1.
  template <int Rows, int Cols, class Memory, class LoadValues>
  static void sum_values(const Memory& s, const ValueBunch& bunch, int row, std::int64_t dim, int ahead,
                         LoadValues load_values) {
    constexpr int together = Cols > 1 ? 2 : 1;
    Vec<T> sums[Rows][Cols];
    for (auto& line : sums)
      for (Vec<T>& sum : line) sum = broadcast(T(0));
    const T* probs = s.scores + row * s.score_stride + bunch.first_key;
    for (int j = 0; j < bunch.count; ++j) {
      const E* value = one_base(row_of<E>(bunch.values, j) + dim);
      const E* later = one_base(row_of<E>(bunch.values, j + ahead) + dim);
      const E* soon = one_base(row_of<E>(bunch.values, j + 2) + dim);
      for (int c = 0; c < Cols; c += together) {
        Vec<T> right[together];
        load_values(value + c * W, right);
        for (int i = 0; i < together; ++i) {
          const int d = (c + i) * W;
          if (d * static_cast<int>(sizeof(E)) % cache_line == 0) fetch_ahead(later + d, soon + d);
          right[i] = in_register(right[i]);
          for (int r = 0; r < Rows; ++r)
            sums[r][c + i] = fma(broadcast(probs[r * s.score_stride + j]), right[i], sums[r][c + i]);
        }
      }
    }
    // Members of s are read before the first store. After a store the compiler would read them again, because it
    // assumes that the store may have changed them.
    const std::int64_t out_stride = s.out_stride;
    T* out = s.out + row * out_stride + dim;
    Vec<T> rescale[Rows];
    for (int r = 0; r < Rows; ++r) rescale[r] = rescale_of(s.rescale, bunch, row + r);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r, out += out_stride)
#pragma GCC unroll 16
      for (int c = 0; c < Cols; c += together) {
        Vec<T> ordered[together];
        for (int i = 0; i < together; ++i) ordered[i] = sums[r][c + i];
        put_in_order(ordered, E());
        for (int i = 0; i < together; ++i) add_sum(out + (c + i) * W, rescale[r], ordered[i]);
      }
  }
};

}  // namespace selfattn::SELFATTN_ISA
