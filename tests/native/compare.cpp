#include "compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace selfattn::test {
namespace {

// The unit roundoff of the type in which results are computed.
double unit_of(const Array& array) { return array.dtype() == DType::f64 ? 0x1p-53 : 0x1p-24; }

double smallest_of(const Array& array) {
  switch (array.dtype()) {
    case DType::f64:
      return std::numeric_limits<double>::denorm_min();
    case DType::f16:
      return 0x1p-24;
    case DType::bf16:
      return 0x1p-133;
    default:
      return static_cast<double>(std::numeric_limits<float>::denorm_min());
  }
}

// The relative error that rounding a result to a 16-bit type may add: half an ulp.
double last_rounding(const Array& array) {
  return array.dtype() == DType::f16 ? 0x1p-11 : array.dtype() == DType::bf16 ? 0x1p-8 : 0;
}

double relative_bound(const Array& array, double sigma) { return (16 + 4 * sigma) * unit_of(array); }

// The largest error divided by its bound. bound(i, y) is called for finite values only; other values must be equal.
template <class Bound>
double largest_share(const Array& got, const Array& exact, Bound bound) {
  if (got.size() != exact.size()) return wrong;
  double share = 0;
  for (std::int64_t i = 0; i < got.size(); ++i) {
    const double x = got.at(i), y = exact.at(i);
    if (std::isnan(y) ? std::isnan(x) : x == y) continue;
    if (!std::isfinite(x) || !std::isfinite(y)) return wrong;
    share = std::max(share, std::abs(x - y) / bound(i, y));
  }
  return share;
}

}  // namespace

double compare_out(const Array& out, const Array& exact, const Array& magnitude, double sigma, double rounding) {
  if (magnitude.size() != exact.size()) return wrong;
  return largest_share(out, exact, [&](std::int64_t i, double y) {
    const double bound = (relative_bound(out, sigma) + rounding) * magnitude.at(i);
    // The result is rounded to its type. For subnormal results, the error of this rounding is absolute.
    return bound + (std::abs(y) + bound) * last_rounding(out) + smallest_of(out);
  });
}

double compare_lse(const Array& lse, const Array& exact, double sigma, double score_rounding) {
  return largest_share(lse, exact, [&](std::int64_t, double y) {
    return (relative_bound(lse, sigma) + sigma * score_rounding) * (1 + std::abs(y));
  });
}

double compare_weights(const Array& weights, const Array& exact, double sigma, double score_rounding) {
  return largest_share(weights, exact, [&](std::int64_t, double y) {
    // The numerator and the denominator of a weight both have errors. The error of a small weight grows with its logit,
    // which includes biases.
    const double logit = y > 0 ? std::abs(std::log(y)) : 0;
    const double bound = relative_bound(weights, sigma) + sigma * score_rounding;
    return (2 * bound + 4 * logit * (unit_of(weights) + score_rounding)) * y + 1e-37;
  });
}

bool same_bits(const Array& a, const Array& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.data(), b.data(), a.bytes()) == 0;
}

}  // namespace selfattn::test
