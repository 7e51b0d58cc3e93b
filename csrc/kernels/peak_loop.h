// The PeakLoop (kernel_set.h) of units that multiply vectors.
#pragma once
#include "kernels/tile_matmul.h"

namespace selfattn::SELFATTN_ISA {

// Each sum is a recurrence, which the compiler cannot simplify. `Chains` independent sums hide the latency of one.
template <class Unit, int Chains>
inline double peak_loop(std::int64_t rounds) noexcept {
  using T = typename Unit::Real;
  Vec<T> sums[Chains];
  for (int i = 0; i < Chains; ++i) sums[i] = broadcast(static_cast<T>(i));
  const Vec<T> factor = broadcast(T(0.999)), term = broadcast(T(0.001));
  for (std::int64_t n = 0; n < rounds; ++n)
    for (int i = 0; i < Chains; ++i) sums[i] = Unit::add_product(sums[i], factor, term);
  Vec<T> total = sums[0];
  for (int i = 1; i < Chains; ++i) total = total + sums[i];
  volatile T used = reduce_sum(total);
  static_cast<void>(used);
  return 2.0 * Unit::cell * Chains * Vec<T>::width * static_cast<double>(rounds);
}

}  // namespace selfattn::SELFATTN_ISA
