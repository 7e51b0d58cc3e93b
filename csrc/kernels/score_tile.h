// A tile of scores: some query rows against some keys. Its vectors run either across rows (each for one key) or across
// keys (each for one row). The template parameter `Axes` (AcrossRows or AcrossKeys) selects the direction, so that code
// that changes scores is written once for both.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"
#include "kernels/pack.h"
#include "kernels/scratch.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
constexpr T minus_infinity = -static_cast<T>(__builtin_inf());
template <class T>
constexpr T largest = sizeof(T) == sizeof(float) ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);

// What each row sees. Keys are counted from the tile's first key.
template <class T>
struct RowLimits {
  T* begin;  // the row sees keys in [begin, end)
  T* end;
  T* distance;  // ALiBi distances are measured from this key
  T* slope;

  RowLimits(Carver& carver, int rows)
      : begin(carver.take<T>(rows)),
        end(carver.take<T>(rows)),
        distance(carver.take<T>(rows)),
        slope(carver.take<T>(rows)) {}
};

// scores[outer * stride + lane]
//
// Functions in hot loops are always inlined, and other functions take a tile by value. GCC then knows which fields are
// constant, and can unroll loops over lanes.
template <class T>
struct ScoreTile {
  T* scores;
  const T* terms;  // mask and bias, in the shape of the scores; null if `visible` need not read them
  int outer;       // keys if vectors run across rows; rows if they run across keys
  int lanes;       // a multiple of the vector width
  int stride;
  bool limited;  // whether keys or padding lanes may be outside a row's limits
  RowLimits<T> limits;
  const Row* rows;
  int num_rows;
  bool shares_terms;  // all rows read the same mask and bias
  std::int64_t first_key;
  int num_keys;
};

// The two types for `Axes`. Three of their functions return a vector for the scores from [outer * stride + lane] on:
//   key          the key of each lane, counted from the tile's first key
//   of_row       the number in `values` that belongs to each lane's row
//   max_of_line  the maximum of each lane's row, from the maxima of single lanes
struct AcrossRows {
  template <class T>
  static Vec<T> key(int outer, int) {
    return broadcast(static_cast<T>(outer));
  }
  template <class T>
  static Vec<T> of_row(const T* values, int, int lane) {
    return load(values + lane);
  }
  template <class T>
  static Vec<T> max_of_line(Vec<T> a) {
    return a;
  }

  // A square of up to W rows and n keys.
  struct Square {
    int key;
    int n;
    int lane;
  };

  template <class T, class RowVector, class Use>
  [[gnu::always_inline]] static void each_vector(const ScoreTile<T>& tile, T* array, RowVector row_vector, Use use) {
    constexpr int W = Vec<T>::width;
    for (int j = 0; j < tile.num_keys; j += W) {
      const int n = tile.num_keys - j < W ? tile.num_keys - j : W;
      for (int l = 0; l < tile.lanes; l += W) each_of_square(tile, array, Square{j, n, l}, row_vector, use);
    }
  }

  // Transposes W x W squares in registers. Lanes without a row get 0.
  template <class T, class RowVector, class Use>
  [[gnu::always_inline]] static void each_of_square(const ScoreTile<T>& tile, T* array, Square at, RowVector row_vector,
                                                    Use use) {
    constexpr int W = Vec<T>::width;
    Vec<T> square[W];
    for (int i = 0; i < W; ++i)
      square[i] = at.lane + i < tile.num_rows ? row_vector(tile.rows[at.lane + i], at.key, at.n) : broadcast(T(0));
    transpose(square);
    T* first = array + at.key * tile.stride + at.lane;
    for (int i = 0; i < at.n; ++i) use(first + i * tile.stride, square[i]);
  }

  template <class T, class RowAddress>
  static void store_rows(const ScoreTile<T>& tile, RowAddress address) {
    columns_to_rows<T>(
        tile.num_rows, tile.num_keys, [&](int row) { return address(tile.rows[row]); },
        [&](std::int64_t key, int row) { return load(tile.scores + key * tile.stride + row); });
  }
};

struct AcrossKeys {
  template <class T>
  static Vec<T> key(int, int lane) {
    return broadcast(static_cast<T>(lane)) + iota(T());
  }
  template <class T>
  static Vec<T> of_row(const T* values, int outer, int) {
    return broadcast(values[outer]);
  }
  template <class T>
  static Vec<T> max_of_line(Vec<T> a) {
    return broadcast(reduce_max(a));
  }

  // Calls use(address, numbers) for vectors of numbers from all rows. row_vector(row, key, n) returns n numbers of a
  // row, starting at the key with this index in the tile. `address` points into `array`, which has the tile's shape.
  template <class T, class RowVector, class Use>
  [[gnu::always_inline]] static void each_vector(const ScoreTile<T>& tile, T* array, RowVector row_vector, Use use) {
    constexpr int W = Vec<T>::width;
    for (int r = 0; r < tile.num_rows; ++r)
      for (int j = 0; j < tile.num_keys; j += W) {
        const int n = tile.num_keys - j < W ? tile.num_keys - j : W;
        use(array + r * tile.stride + j, row_vector(tile.rows[r], j, n));
      }
  }

  // Stores each row's scores at address(row), in the order of keys.
  template <class T, class RowAddress>
  static void store_rows(const ScoreTile<T>& tile, RowAddress address) {
    for (int r = 0; r < tile.num_rows; ++r) {
      T* to = address(tile.rows[r]);
      for (int j = 0; j < tile.num_keys; j += Vec<T>::width)
        store_up_to(to + j, load(tile.scores + r * tile.stride + j), tile.num_keys - j);
    }
  }
};

template <class T, class Change>
[[gnu::always_inline]] inline void change_scores(const ScoreTile<T>& tile, Change change) {
  for (int o = 0; o < tile.outer; ++o)
    for (int l = 0; l < tile.lanes; l += Vec<T>::width) {
      T* score = tile.scores + o * tile.stride + l;
      store(score, change(load(score), o, l));
    }
}

template <class Axes, class T>
inline Mask<T> visible(const ScoreTile<T>& tile, int outer, int lane) {
  const Vec<T> key = Axes::template key<T>(outer, lane);
  const RowLimits<T>& row = tile.limits;
  Mask<T> seen = (Axes::of_row(row.begin, outer, lane) <= key) & (key < Axes::of_row(row.end, outer, lane));
  if (tile.terms) {
    const Vec<T> term = load(tile.terms + outer * tile.stride + lane);
    seen = seen & ((broadcast(minus_infinity<T>) < term) | is_nan(term));
  }
  return seen;
}

}  // namespace selfattn::SELFATTN_ISA
