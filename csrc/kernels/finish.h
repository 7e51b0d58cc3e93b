// The steps that follow the product of a linear layer. They run while the sums are still in the cache.
#pragma once
#include "kernels/activation.h"

namespace selfattn::SELFATTN_ISA {

// E: the type of the residual and of the result.
template <class T, class E>
inline void finish(const FinishArgs& args) noexcept {
  T* sums = static_cast<T*>(args.sums);
  T* gates = static_cast<T*>(args.gates);
  const E* residual = static_cast<const E*>(args.residual);
  E* out = static_cast<E*>(args.out);
  for (std::int64_t r = 0; r < args.rows; ++r, sums += args.sums_stride, out += args.out_stride) {
    activate<T>(args.activation, gates ? gates : sums, args.columns);
    for (std::int64_t i = 0; i < args.columns; i += Vec<T>::width) {
      const std::int64_t left = args.columns - i;
      Vec<T> v = load_up_to(sums + i, left);
      if (gates) v = v * load_up_to(gates + i, left);
      if (residual) v = v + load_up_to(residual + i, left);
      store_up_to(out + i, v, left);
    }
    if (gates) gates += args.sums_stride;
    if (residual) residual += args.residual_stride;
  }
}

}  // namespace selfattn::SELFATTN_ISA
