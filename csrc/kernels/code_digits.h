// Numbers of 24 bits as three digits of 8 bits, which are multiplied by 8-bit codes. Products of bytes and their sums
// are exact.
#pragma once
#include "simd/bytes_avx512.h"

namespace selfattn::SELFATTN_ISA {

constexpr int code_digits = 3;  // the highest comes first

// The number whose digits were multiplied: the sums of their products, joined.
inline VecF join_digits(const VecF (&sums)[code_digits]) {
  VecF joined = sums[0];
#pragma GCC unroll 4
  for (int n = 1; n < code_digits; ++n) joined = fma(joined, broadcast(256.0f), sums[n]);
  return joined;
}

// An n with x < 2^n, for x >= 0. At least -126: subnormal numbers have the unit of the smallest normal ones.
inline int power_above(float x) { return static_cast<int>(bits_of(x) >> 23) - 126; }

// Rounds x / 2^power to integers, for results below 2^24.
inline Integers in_units(VecF x, int power) {
  return to_integers(scale_by_power(x, broadcast(static_cast<float>(-power))));
}

}  // namespace selfattn::SELFATTN_ISA
