// Constants and rounding helpers shared by drivers and kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace selfattn {

constexpr double log2_e = 1.4426950408889634074;
constexpr double ln_2 = 0.69314718055994530942;

// Clamps a finite number to [-most, most]; NaN and infinities stay. Always inlined, because drivers and kernels are
// compiled for different instruction sets.
[[gnu::always_inline]] constexpr double clamp_finite(double x, double most) {
  if (!__builtin_isfinite(x)) return x;
  return x < -most ? -most : x > most ? most : x;
}

// a / b rounded up, for non-negative a and positive b. Cannot overflow.
template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return a / b + (a % b != 0);
}

// The least multiple of b that is not less than a.
template <class A, class B>
constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

// The greatest multiple of b that is not greater than a, for positive b.
template <class T>
constexpr T round_down(T a, T b) {
  const T rest = a % b;
  return a - (rest < 0 ? rest + b : rest);
}

// Rounds a number of bytes up to whole cache lines.
constexpr std::size_t whole_lines(std::size_t bytes) { return round_up(bytes, std::size_t{64}); }

}  // namespace selfattn
