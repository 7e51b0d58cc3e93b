// Linear projection: out = x . weights + bias for some rows of x and one packed panel of weight columns.
#pragma once
#include "kernels/kernel_set.h"
#include "kernels/pack.h"
#include "kernels/tile_matmul.h"

namespace selfattn::SELFATTN_ISA {

// B: the type of the weights in memory.
template <class Unit, int TileRows, int Vectors, class B = typename Unit::Real>
inline void project(const ProjectArgs& args) noexcept {
  using T = typename Unit::Real;
  constexpr int W = Vec<T>::width;
  const T* bias = static_cast<const T*>(args.bias);
  T* out = static_cast<T*>(args.out);
  multiply_rows<TileRows, Vectors, Unit>(
      RowMajor<T>{static_cast<const T*>(args.x), args.x_step / Unit::cell}, args.rows,
      static_cast<const B*>(args.panel), std::int64_t{Vectors} * W, (args.depth + Unit::cell - 1) / Unit::cell,
      [&](std::int64_t i, const auto& sums) {
        for (const auto& row : sums) {
          T* o = out + i++ * args.out_step;
          for (int c = 0; c < Vectors && c * W < args.columns; ++c)
            store_up_to(o + c * W, bias ? row[c] + load(bias + c * W) : row[c], args.columns - c * W);
        }
      });
}

}  // namespace selfattn::SELFATTN_ISA
