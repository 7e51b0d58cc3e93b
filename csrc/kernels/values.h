// 0 * NaN is NaN. Products include the values of hidden keys with weight 0, which is harmless only if they are finite.
// So the values of tiles with hidden keys are scanned. If there is a NaN or Inf, a slower path skips the hidden keys.
#pragma once
#include "kernels/kernel_set.h"
#include "kernels/pack.h"

namespace selfattn::SELFATTN_ISA {

// row(r) points to value_dim numbers.
template <class Row>
inline bool all_finite(Row row, int rows, std::int64_t value_dim) {
  auto zero = load_up_to(row(0), 0);
  auto sum = zero;
  for (int r = 0; r < rows; ++r) {
    const auto* values = row(r);
    for (std::int64_t d = 0; d < value_dim; d += decltype(sum)::width)
      sum = sum + load_up_to(values + d, value_dim - d) * zero;
  }
  return !any(is_nan(sum));
}

}  // namespace selfattn::SELFATTN_ISA
