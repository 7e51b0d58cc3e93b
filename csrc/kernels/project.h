// Linear projection: out = x . weights + bias for some rows of x and packed panels of weight columns.
#pragma once
#include "kernels/element_type.h"
#include "kernels/kernel_set.h"
#include "kernels/pack.h"
#include "kernels/tile_matmul.h"

namespace selfattn::SELFATTN_ISA {

// A slice of the depth: at most depth_slice elements, or the depth of one group of codes, which share their scales.
// `first` counts cells.
struct DepthSlice {
  std::int64_t index, first;
  bool last;
};

// Multiplies a single row of x, or its rows of digits, by several panels at once. A single panel has too few sums to
// keep the FMA units busy, and a single stream of weights cannot use the whole memory bandwidth.
template <class Unit, int Panels, int Rows, int Vectors, class A, class B, class T = typename Unit::Real>
[[gnu::always_inline]] inline void multiply_row(RowMajor<A> x, const B* b, std::int64_t panel_stride,
                                                std::int64_t depth, Vec<T> (&sums)[Panels][Rows][Vectors]) {
  constexpr int W = Vec<T>::width;
  Vec<T> own[Panels][Rows][Vectors];
  for (auto& panel : own)
    for (auto& row : panel)
      for (auto& sum : row) sum = Vec<T>{};
  for (std::int64_t k = 0; k < depth; ++k, b += Vectors * W) {
    decltype(broadcast(x.at(0, k))) left[Rows];
    for (int r = 0; r < Rows; ++r) left[r] = broadcast(x.at(r, k));
    for (int p = 0; p < Panels; ++p)
      for (int c = 0; c < Vectors; ++c) {
        const auto right = load(b + p * panel_stride + c * W);
        for (int r = 0; r < Rows; ++r) own[p][r][c] = Unit::add_product(left[r], right, own[p][r][c]);
      }
  }
  for (int p = 0; p < Panels; ++p)
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Vectors; ++c) sums[p][r][c] = own[p][r][c];
}

// Adds a vector of sums to `out`, which holds the sums of earlier slices of the depth. Adds the bias in the last slice.
template <class V>
inline void store_sum(const ProjectArgs& args, DepthSlice slice, std::int64_t row, std::int64_t column, V sum) {
  using T = decltype(reduce_max(sum));
  T* out = static_cast<T*>(args.out) + row * args.out_stride + column;
  if (slice.index > 0) sum = sum + load_up_to(out, args.columns - column);
  if (slice.last && args.bias) sum = sum + load(static_cast<const T*>(args.bias) + column);
  store_up_to(out, sum, args.columns - column);
}

// Adds the sums of one row and one panel to `out`. The panel's columns start at `first`. If weights are codes, the sums
// are scaled first.
template <bool Scaled, int Vectors, class T>
inline void store_row(const ProjectArgs& args, DepthSlice slice, std::int64_t row, std::int64_t first,
                      const Vec<T> (&sums)[Vectors]) {
  for (int c = 0; c < Vectors && first < args.columns; ++c, first += Vec<T>::width) {
    Vec<T> sum = sums[c];
    if constexpr (Scaled) sum = sum * load(args.scales + slice.index * args.scale_stride + first);
    store_sum(args, slice, row, first, sum);
  }
}

// A: the type of a cell of x in memory; B: of a cell of the weights.
template <class Unit, int TileRows, int Vectors, class B = typename Unit::Real, class A = typename Unit::Real>
inline void project(const ProjectArgs& args) noexcept {
  using T = typename Unit::Real;
  constexpr int width = Vectors * Vec<T>::width, together = 4;
  constexpr bool codes = scaled<B>;
  const std::int64_t all = ceil_div(args.depth, Unit::cell);
  const std::int64_t most = codes ? all / args.groups : depth_slice / Unit::cell;
  const std::int64_t panel_stride = args.panel_stride / static_cast<std::int64_t>(sizeof(B));
  for (DepthSlice slice{0, 0, false}; !slice.last; slice.first += most, ++slice.index) {
    const std::int64_t depth = all - slice.first < most ? all - slice.first : most;
    slice.last = slice.first + depth == all;
    const RowMajor<A> x{static_cast<const A*>(args.x) + slice.first, args.x_stride / Unit::cell};
    const B* panel = static_cast<const B*>(args.panel) + slice.first * width;
    std::int64_t first = 0;
    if (args.rows == 1)
      for (; first + (together - 1) * width < args.columns;
           first += together * width, panel += together * panel_stride) {
        Vec<T> sums[together][1][Vectors];
        multiply_row<Unit>(x, panel, panel_stride, depth, sums);
        for (int p = 0; p < together; ++p) store_row<codes>(args, slice, 0, first + p * width, sums[p][0]);
      }
    for (; first < args.columns; first += width, panel += panel_stride)
      multiply_rows<TileRows, Vectors, Unit>(x, args.rows, RightOperand<B>{panel, width, depth},
                                             [&](std::int64_t row, const auto& sums) {
                                               for (const auto& s : sums)
                                                 store_row<codes>(args, slice, row++, first, s);
                                             });
  }
}

}  // namespace selfattn::SELFATTN_ISA
