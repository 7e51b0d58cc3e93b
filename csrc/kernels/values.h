// 0 * NaN is NaN. Products include the values of hidden keys with weight 0, which is harmless only if these values are
// finite. So if a tile has hidden keys, its values are scanned for NaN and Inf. If only keys that no row sees have such
// values, zeros take their place. If some row sees such a value, a slower path skips the hidden keys.
#pragma once
#include "kernels/kernel_set.h"
#include "kernels/pack.h"

namespace selfattn::SELFATTN_ISA {

// Whether all numbers of all rows are finite: 0 * x is 0 for finite x, and NaN otherwise. row(r) points to value_dim
// numbers. Several chains of sums hide the latency of additions.
template <class Row>
inline bool all_finite(Row row, int rows, std::int64_t value_dim) {
  const auto zero = load_up_to(row(0), 0);
  constexpr int W = decltype(zero)::width, chains = 4;
  decltype(load(row(0))) sums[chains] = {zero, zero, zero, zero};
  for (int r = 0; r < rows; ++r) {
    const auto* values = row(r);
    std::int64_t d = 0;
    for (; value_dim - d >= chains * W; d += chains * W)
      for (int i = 0; i < chains; ++i) sums[i] = sums[i] + load(values + d + i * W) * zero;
    for (; d < value_dim; d += W) sums[0] = sums[0] + load_up_to(values + d, value_dim - d) * zero;
  }
  return !any(is_nan((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

}  // namespace selfattn::SELFATTN_ISA
