// Holds results to the bounds of docs/numerics.md; the same as tests/conftest.py does in Python.
#pragma once
#include <limits>

#include "vectors_file.h"

namespace selfattn::test {

// The largest share of its bound that an error takes; more than 1, or `wrong`, fails.
constexpr double wrong = std::numeric_limits<double>::infinity();

// What a matrix unit rounds before it multiplies: how far that moves a result, relative to the sum of p |v|, by
// rounding weights and values, and per unit of sigma by rounding queries and keys.
struct Rounding {
  double values = 0, scores = 0;
};

double compare_out(const Array& out, const Array& exact, const Array& magnitude, double sigma, Rounding rounding);
double compare_lse(const Array& lse, const Array& exact, double sigma, Rounding rounding);
double compare_weights(const Array& weights, const Array& exact, double sigma, Rounding rounding);

bool same_bits(const Array& a, const Array& b);

}  // namespace selfattn::test
