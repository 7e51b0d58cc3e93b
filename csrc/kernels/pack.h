// Loads and stores of up to one vector, and transposition between rows in memory and columns of vectors.
#pragma once
#include <cstdint>

#include "simd/vec.h"

namespace selfattn::SELFATTN_ISA {

template <class E>
inline auto load_up_to(const E* p, std::int64_t n) {
  return n >= decltype(load(p))::width ? load(p) : load_partial(p, static_cast<int>(n));
}

template <class T, class E>
inline void store_up_to(E* p, Vec<T> a, std::int64_t n) {
  if (n >= Vec<T>::width)
    store(p, a);
  else
    store_partial(p, a, static_cast<int>(n));
}

// Transposes rows into columns: columns[j * stride + i] is element j of row i. row_vector(i, j, n) returns n elements
// of row i, starting at element j.
template <class T, class RowVector>
inline void rows_to_columns(T* columns, std::int64_t stride, int rows, std::int64_t count, RowVector row_vector) {
  constexpr int W = Vec<T>::width;
  for (int i = 0; i < rows; i += W)
    for (std::int64_t j = 0; j < count; j += W) {
      const int n = static_cast<int>(count - j < W ? count - j : W);
      Vec<T> square[W];
      for (int l = 0; l < W; ++l) square[l] = row_vector(i + l, j, n);
      transpose(square);
      for (int l = 0; l < n; ++l) store(columns + (j + l) * stride + i, square[l]);
    }
}

// The inverse: row(i)[j] is element i of column j. column_vector(j, i) returns a vector of elements of column j,
// starting at element i.
template <class T, class Row, class ColumnVector>
inline void columns_to_rows(int rows, std::int64_t count, Row row, ColumnVector column_vector) {
  constexpr int W = Vec<T>::width;
  for (int i = 0; i < rows; i += W)
    for (std::int64_t j = 0; j < count; j += W) {
      const int n = static_cast<int>(count - j < W ? count - j : W);
      Vec<T> square[W];
      for (int l = 0; l < W; ++l) square[l] = l < n ? column_vector(j + l, i) : broadcast(T(0));
      transpose(square);
      for (int l = 0; l < W && i + l < rows; ++l) store_up_to(row(i + l) + j, square[l], n);
    }
}

}  // namespace selfattn::SELFATTN_ISA
