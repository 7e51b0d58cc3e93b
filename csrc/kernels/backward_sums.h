// The sums of the backward pass, over keys and over rows. For relative products (backward_relative.h), vectors of
// distances take the place of keys.
#pragma once
#include "kernels/backward_strips.h"
#include "kernels/pack.h"
#include "kernels/tile_matmul.h"
#include "kernels/values.h"

namespace selfattn::SELFATTN_ISA {

// The pairs of key and row that sums must skip. Their factor is 0, but the other operand may be NaN or infinite. A pair
// is skipped if its element of `marks`, [key][row], equals `value`. If `marks` is null, none is skipped.
template <class T>
struct Skipped {
  const T* marks = nullptr;
  T value = 0;
  std::int64_t stride = 0;  // from one key to the next

  explicit operator bool() const { return marks != nullptr; }
  Skipped from(std::int64_t offset) const { return {marks ? marks + offset : nullptr, value, stride}; }
  Mask<T> lanes(int key, std::int64_t row) const { return load(marks + key * stride + row) == broadcast(value); }
  bool at(int key, int row) const { return marks[key * stride + row] == value; }
};

template <class Unit, int TileRows, int SumRows>
struct BackwardSums {
  using T = typename Unit::Real;
  static constexpr int W = Vec<T>::width, cell = Unit::cell;

  // sums[dim][row] += sum over keys of keys[key][dim] * factors[key][row], for a strip of `Cols` vectors. In both
  // operands, a cell holds adjacent keys.
  struct KeySums {
    const T* keys;
    std::int64_t key_stride;
    int count;  // of keys
    const T* factors;
    std::int64_t factor_stride;
    Skipped<T> skipped;
  };

  template <int Cols>
  [[gnu::noinline]] static void add_key_sums(const KeySums& sums, std::int64_t head_dim, T* to) {
    if (sums.skipped) return add_some_keys<Cols>(sums, head_dim, to);
    multiply_rows<TileRows, Cols, Unit>(Transposed<T>{sums.keys, sums.key_stride}, head_dim,
                                        RightOperand<T>{sums.factors, sums.factor_stride, cells<Unit>(sums.count)},
                                        [&](std::int64_t dim, const auto& tile) {
                                          T* sum = to + dim * Cols * W;
                                          for (const auto& row : tile)
                                            for (int c = 0; c < Cols; ++c, sum += W) store(sum, load(sum) + row[c]);
                                        });
  }

  // sums[key][dim] += sum over rows of factors[key][row] * rows[row][dim]. In both operands, a cell holds adjacent
  // rows.
  struct RowSums {
    const T* factors;
    std::int64_t factor_stride;
    const T* rows;
    std::int64_t row_stride;
    Skipped<T> skipped;
  };

  template <int Cols>
  static void add_row_sums(const RowSums& sums, int keys, int rows, T* to, std::int64_t dim = 0) {
    if (sums.skipped) return add_some_rows(sums, keys, rows, to);
    for (; sums.row_stride - dim >= Cols * W; dim += Cols * W) multiply_row_sums<Cols>(sums, keys, rows, to, dim);
    if constexpr (Cols > 1)
      if (dim < sums.row_stride) add_row_sums<Cols - 1>(sums, keys, rows, to, dim);
  }

  static bool finite(const void* numbers, std::int64_t count) noexcept {
    return all_finite([&](int) { return static_cast<const typename Unit::Element*>(numbers); }, 1, count);
  }

  static double dot(const void* a, const void* b, std::int64_t count) noexcept {
    Vec<T> sum = broadcast(T(0));
    for (std::int64_t i = 0; i < count; i += W)
      sum = fma(load(static_cast<const T*>(a) + i), load(static_cast<const T*>(b) + i), sum);
    return static_cast<double>(reduce_sum(sum));
  }

  static void add(const void* from, std::int64_t count, void* to) noexcept {
    const T* term = static_cast<const T*>(from);
    T* sum = static_cast<T*>(to);
    for (std::int64_t i = 0; i < count; i += W)
      store_up_to(sum + i, load_up_to(sum + i, count - i) + load_up_to(term + i, count - i), count - i);
  }

  // `clear` sets the sums of a strip to 0. `store_rows` stores them as rows, `stride` elements apart.
  template <int Cols>
  static void clear(std::int64_t head_dim, T* sums) {
    for (std::int64_t i = 0; i < head_dim * Cols * W; i += W) store(sums + i, broadcast(T(0)));
  }
  template <int Cols>
  static void store_rows(const T* sums, int rows, std::int64_t head_dim, T* to, std::int64_t stride) {
    columns_to_rows<T>(
        rows, head_dim, [&](int row) { return to + row * stride; },
        [&](std::int64_t dim, int row) { return load(sums + dim * Cols * W + row); });
  }

 private:
  template <int Cols>
  static void add_some_keys(const KeySums& sums, std::int64_t head_dim, T* to) {
    for (std::int64_t dim = 0; dim < head_dim; ++dim)
      for (int c = 0; c < Cols; ++c, to += W) {
        Vec<T> sum = broadcast(T(0));
        for (std::int64_t k = 0; k < cells<Unit>(sums.count); ++k) {
          Vec<T> seen = broadcast(sums.keys[k * sums.key_stride + dim]);
          for (int i = 0, key = static_cast<int>(k) * cell; i < cell && key < sums.count; ++i, ++key)
            seen = Unit::without(seen, i, sums.skipped.lanes(key, c * W));
          sum = Unit::add_product(seen, load(sums.factors + k * sums.factor_stride + c * W), sum);
        }
        store(to, load(to) + sum);
      }
  }

  template <int Cols>
  [[gnu::noinline]] static void multiply_row_sums(const RowSums& sums, int keys, int rows, T* to, std::int64_t dim) {
    const std::int64_t stride = sums.row_stride;
    multiply_rows<SumRows, Cols, Unit>(RowMajor<T>{sums.factors, sums.factor_stride}, keys,
                                       RightOperand<T>{sums.rows + dim, stride, cells<Unit>(rows)},
                                       [&](std::int64_t key, const auto& tile) {
                                         T* sum = to + key * stride + dim;
                                         for (const auto& row : tile) {
                                           for (int c = 0; c < Cols; ++c)
                                             store(sum + c * W, load(sum + c * W) + row[c]);
                                           sum += stride;
                                         }
                                       });
  }

  static void add_some_rows(const RowSums& sums, int keys, int rows, T* to) {
    const Mask<T> all_lanes = broadcast(T(0)) == broadcast(T(0));
    for (int key = 0; key < keys; ++key)
      for (std::int64_t dim = 0; dim < sums.row_stride; dim += W, to += W) {
        Vec<T> sum = broadcast(T(0));
        for (std::int64_t k = 0; k < cells<Unit>(rows); ++k) {
          Vec<T> seen = load(sums.rows + k * sums.row_stride + dim);
          for (int i = 0, row = static_cast<int>(k) * cell; i < cell && row < rows; ++i, ++row)
            if (sums.skipped.at(key, row)) seen = Unit::without(seen, i, all_lanes);
          sum = Unit::add_product(broadcast(sums.factors[key * sums.factor_stride + k]), seen, sum);
        }
        store(to, load(to) + sum);
      }
  }
};

}  // namespace selfattn::SELFATTN_ISA
