// Integers as 8-bit digits. Kernels multiply the digits by 8-bit codes. The products and their sums are integers, and
// exact.
#pragma once
#include "simd/bytes_avx512.h"

namespace selfattn::SELFATTN_ISA {

constexpr int code_digits = 3;  // of the 24-bit integers in attention; the highest comes first

// Joins the sums of products of each digit into the sum of products of the whole number.
template <int Digits>
inline VecF join_digits(const VecF (&sums)[Digits]) {
  VecF joined = sums[0];
#pragma GCC unroll 4
  for (int n = 1; n < Digits; ++n) joined = fma(joined, broadcast(256.0f), sums[n]);
  return joined;
}

// An n with x < 2^n, for x >= 0. It is -126 for 0 and for all subnormal numbers.
inline int power_above(float x) { return static_cast<int>(bits_of(x) >> 23) - 126; }

// The multiples of 2^power that are nearest to x, for multiples below 2^24.
inline Integers in_multiples(VecF x, int power) {
  return to_integers(scale_by_power(x, broadcast(static_cast<float>(-power))));
}

}  // namespace selfattn::SELFATTN_ISA
