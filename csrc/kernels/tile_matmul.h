// The micro-kernel: a tile of rows x vectors of sums, kept in registers.
//
//   sums[r][c] = sum_k a(r, k) * b[k][c]      cells of a are broadcast, b is loaded as vectors
//
// A cell is the group of adjacent elements along k that the unit multiplies at once: one element, or a pair of bfloat16
// numbers. On AVX-512, a tile has 8 x 3 vectors of sums. One step along k then takes 24 FMAs and 11 loads, so the FMA
// units are the bottleneck. In a tile of any shape, each sum is one chain of FMAs in the order of k. So results do not
// depend on where a tile ends.
#pragma once
#include <cstdint>

#include "simd/vec.h"

namespace selfattn::SELFATTN_ISA {

// Multiplies single elements.
template <class T>
struct FmaUnit {
  using Real = T;
  using Element = T;  // of operands in memory
  static constexpr int cell = 1;
  static Vec<T> add_product(Vec<T> a, Vec<T> b, Vec<T> sum) { return fma(a, b, sum); }
};

// A row-major matrix in memory, or its transpose.
template <class T>
struct RowMajor {
  const T* data;
  std::int64_t step;  // cells from one row to the next
  T at(int r, std::int64_t k) const { return data[r * step + k]; }
  RowMajor from_row(std::int64_t r) const { return {data + r * step, step}; }
};
template <class T>
struct Transposed {
  const T* data;
  std::int64_t step;
  T at(int r, std::int64_t k) const { return data[k * step + r]; }
  Transposed from_row(std::int64_t r) const { return {data + r, step}; }
};

template <int Rows, int Cols, class Unit, class T = typename Unit::Real, class A, class B>
[[gnu::always_inline]] inline void multiply_tile(A a, RowMajor<B> b, std::int64_t depth, Vec<T> (&sums)[Rows][Cols]) {
  Vec<T> own[Rows][Cols];  // a local array: on some ISAs GCC would store to the caller's array inside the loop
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) own[r][c] = broadcast(T(0));
  for (std::int64_t k = 0; k < depth; ++k, b.data += b.step) {
    Vec<T> right[Cols];
    for (int c = 0; c < Cols; ++c) right[c] = load(b.data + c * Vec<T>::width);
    for (int r = 0; r < Rows; ++r) {
      const auto left = broadcast(a.at(r, k));
      for (int c = 0; c < Cols; ++c) own[r][c] = Unit::add_product(left, right[c], own[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) sums[r][c] = own[r][c];
}

// Multiplies `rows` rows, and calls finish(first_row, sums) for each tile. Tiles have `Rows` rows. For the remaining
// rows, `Rows` is halved.
template <int Rows, int Cols, class Unit, class A, class B, class Finish>
[[gnu::always_inline]] inline void multiply_rows(A a, std::int64_t rows, RowMajor<B> b, std::int64_t depth,
                                                 Finish finish, std::int64_t done = 0) {
  for (; rows - done >= Rows; done += Rows) {
    Vec<typename Unit::Real> sums[Rows][Cols];
    multiply_tile<Rows, Cols, Unit>(a.from_row(done), b, depth, sums);
    finish(done, sums);
  }
  if constexpr (Rows > 1) {
    if (done < rows) multiply_rows<Rows / 2, Cols, Unit>(a, rows, b, depth, finish, done);
  }
}

// products[r][c] = factor * sum_k a(r, k) * b[k][c]. Lines of b and of products have Cols vectors.
template <int Rows, int Cols, class Unit, class T = typename Unit::Real>
[[gnu::always_inline]] inline void store_products(RowMajor<T> a, std::int64_t rows, const T* b, std::int64_t depth,
                                                  T factor, T* products) {
  constexpr int W = Vec<T>::width;
  multiply_rows<Rows, Cols, Unit>(a, rows, RowMajor<T>{b, Cols * W}, depth, [&](std::int64_t first, const auto& sums) {
    T* to = products + first * Cols * W;
    for (const auto& row : sums)
      for (int c = 0; c < Cols; ++c, to += W) store(to, row[c] * broadcast(factor));
  });
}

}  // namespace selfattn::SELFATTN_ISA
