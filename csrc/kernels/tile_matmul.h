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
  std::int64_t stride;  // cells from one row to the next
  T at(int r, std::int64_t k) const { return data[r * stride + k]; }
  RowMajor from_row(std::int64_t r) const { return {data + r * stride, stride}; }
};
template <class T>
struct Transposed {
  const T* data;
  std::int64_t stride;
  T at(int r, std::int64_t k) const { return data[k * stride + r]; }
  Transposed from_row(std::int64_t r) const { return {data + r, stride}; }
};

// The right operand of a product: `depth` lines of vectors.
template <class T>
struct RightOperand {
  const T* data;
  std::int64_t stride;  // cells from one line to the next
  std::int64_t depth;
};

// A product calls fetches.fetch() before every `interval` steps along k. NoFetches does nothing; Ahead (ahead.h)
// prefetches.
struct NoFetches {
  static constexpr std::int64_t interval = std::int64_t{1} << 62;
  void fetch() {}
};

template <int Rows, int Cols, class Unit, class T = typename Unit::Real, class A, class B, class Fetches>
[[gnu::always_inline]] inline void multiply_tile(A a, RightOperand<B> b, Fetches& fetches, Vec<T> (&sums)[Rows][Cols]) {
  Vec<T> own[Rows][Cols];  // a local array: on some ISAs GCC would store to the caller's array inside the loop
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) own[r][c] = Vec<T>{};
  for (std::int64_t k = 0; k < b.depth;) {
    fetches.fetch();
    const std::int64_t end = b.depth - k < Fetches::interval ? b.depth : k + Fetches::interval;
    for (; k < end; ++k, b.data += b.stride) {
      decltype(load(b.data)) right[Cols];
      for (int c = 0; c < Cols; ++c) right[c] = load(b.data + c * Vec<T>::width);
      for (int r = 0; r < Rows; ++r) {
        const auto left = broadcast(a.at(r, k));
        for (int c = 0; c < Cols; ++c) own[r][c] = Unit::add_product(left, right[c], own[r][c]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) sums[r][c] = own[r][c];
}

// Multiplies `rows` rows, and calls finish(first_row, sums) for each tile. Tiles have `Rows` rows. For the remaining
// rows, `Rows` is halved.
template <int Rows, int Cols, class Unit, class A, class B, class Finish, class Fetches = NoFetches>
[[gnu::always_inline]] inline void multiply_rows(A a, std::int64_t rows, RightOperand<B> b, Finish finish,
                                                 Fetches fetches = {}, std::int64_t done = 0) {
  for (; rows - done >= Rows; done += Rows) {
    Vec<typename Unit::Real> sums[Rows][Cols];
    multiply_tile<Rows, Cols, Unit>(a.from_row(done), b, fetches, sums);
    finish(done, sums);
  }
  if constexpr (Rows > 1) {
    if (done < rows) multiply_rows<Rows / 2, Cols, Unit>(a, rows, b, finish, fetches, done);
  }
}

// products[r][c] = factor * sum_k a(r, k) * b[k][c]. Lines of b and of products have Cols vectors.
template <int Rows, int Cols, class Unit, class T = typename Unit::Real, class Fetches = NoFetches>
[[gnu::always_inline]] inline void store_products(RowMajor<T> a, std::int64_t rows, RightOperand<T> b, T factor,
                                                  T* products, Fetches fetches = {}) {
  constexpr int W = Vec<T>::width;
  const auto finish = [&](std::int64_t first, const auto& sums) {
    T* to = products + first * Cols * W;
    for (const auto& row : sums)
      for (int c = 0; c < Cols; ++c, to += W) store(to, row[c] * broadcast(factor));
  };
  multiply_rows<Rows, Cols, Unit>(a, rows, b, finish, fetches);
}

// out[r][c] = out[r][c] * rescale[c] + sum_k a(r, k) * b[k][c]. Lines of b and of out have Cols vectors.
template <int Rows, int Cols, class Unit, class T = typename Unit::Real, class A, class Fetches>
[[gnu::always_inline]] inline void add_products_to(A a, std::int64_t rows, RightOperand<T> b,
                                                   const Vec<T> (&rescale)[Cols], T* out, Fetches fetches) {
  constexpr int W = Vec<T>::width;
  const auto finish = [&](std::int64_t first, const auto& sums) {
    T* o = out + first * Cols * W;
    for (const auto& row : sums)
      for (int c = 0; c < Cols; ++c, o += W) store(o, fma(load(o), rescale[c], row[c]));
  };
  multiply_rows<Rows, Cols, Unit>(a, rows, b, finish, fetches);
}

}  // namespace selfattn::SELFATTN_ISA
