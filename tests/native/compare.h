// Checks results against the bounds of docs/numerics.md, as tests/conftest.py does in Python.
#pragma once
#include <limits>

#include "vectors_file.h"

namespace selfattn::test {

// The compare functions return the largest error divided by its bound. A result above 1, such as `wrong`, is a failure.
constexpr double wrong = std::numeric_limits<double>::infinity();

// The bounds allow for errors of the unit that multiplies: `rounding` in out, and sigma * `score_rounding` in lse and
// weights.
double compare_out(const Array& out, const Array& exact, const Array& magnitude, double sigma, double rounding);
double compare_lse(const Array& lse, const Array& exact, double sigma, double score_rounding);
double compare_weights(const Array& weights, const Array& exact, double sigma, double score_rounding);

bool same_bits(const Array& a, const Array& b);

}  // namespace selfattn::test
