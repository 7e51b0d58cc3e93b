// 0 * NaN is NaN: a hidden value row takes part in a product as weight 0 times value, which is harmless only while the
// value is finite. Tiles with hidden keys are scanned, and those that hold a NaN or Inf take a path that selects.
#pragma once
#include "kernels/kernel_set.h"
#include "kernels/pack.h"

namespace selfattn::SELFATTN_ISA {

template <class E>
inline bool all_finite(const E* values, std::int64_t step, int rows, std::int64_t value_dim) {
  auto zero = load_up_to(values, 0);
  auto sum = zero;
  for (int r = 0; r < rows; ++r, values += step)
    for (std::int64_t d = 0; d < value_dim; d += decltype(sum)::width)
      sum = sum + load_up_to(values + d, value_dim - d) * zero;
  return !any(is_nan(sum));
}

}  // namespace selfattn::SELFATTN_ISA
