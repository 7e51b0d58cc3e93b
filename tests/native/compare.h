// Checks results against the bounds of docs/numerics.md, as tests/conftest.py does in Python.
#pragma once
#include <limits>

#include "vectors_file.h"

namespace selfattn::test {

// The functions return the largest error divided by its bound. More than 1, or `wrong`, is a failure.
constexpr double wrong = std::numeric_limits<double>::infinity();

// The unit that multiplies adds to the bounds: `rounding` to the bound of out, `score_rounding` per unit of sigma to
// the others.
double compare_out(const Array& out, const Array& exact, const Array& magnitude, double sigma, double rounding);
double compare_lse(const Array& lse, const Array& exact, double sigma, double score_rounding);
double compare_weights(const Array& weights, const Array& exact, double sigma, double score_rounding);

bool same_bits(const Array& a, const Array& b);

}  // namespace selfattn::test
