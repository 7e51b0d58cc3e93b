// Checks results against the bounds of docs/numerics.md, as tests/conftest.py does in Python.
#pragma once
#include <limits>

#include "vectors_file.h"

namespace selfattn::test {

// The largest error as a share of its bound; more than 1, or `wrong`, fails.
constexpr double wrong = std::numeric_limits<double>::infinity();

// What the unit that multiplies adds to the bounds: `rounding` to that of out, and per unit of sigma to the others.
double compare_out(const Array& out, const Array& exact, const Array& magnitude, double sigma, double rounding);
double compare_lse(const Array& lse, const Array& exact, double sigma, double score_rounding);
double compare_weights(const Array& weights, const Array& exact, double sigma, double score_rounding);

bool same_bits(const Array& a, const Array& b);

}  // namespace selfattn::test
