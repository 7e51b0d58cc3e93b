// exp2 and related functions on vectors.
//
// 2^t = 2^n * 2^f with n = round(t), |f| <= 1/2, and 2^f = 1 + f*P(f). P interpolates (2^f - 1)/f at Chebyshev points:
// the relative error of 2^f is below 1e-8 for float (degree 5) and below 1e-17 for double (degree 11). Rounding adds
// about 1 ulp. No split of ln 2 is needed because scores are already in log2 units.
#pragma once
#include "arithmetic.h"
#include "simd/vec.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float coefficients[] = {0.00015453163134738f, 0.0013390863583684f, 0.0096180825569226f,
                                           0.055503571138085f,   0.24022650760569f,   0.69314718802631f};
  static constexpr float lowest = -160.0f;  // 2^-160 rounds to 0, and t - round(t) stays exact
};
template <>
struct Exp2<double> {
  static constexpr double coefficients[] = {
      2.5729324371667713331e-11, 4.4558179475918685609e-10,  7.0548973040462037954e-9,  1.0178057087513130293e-7,
      1.3215486808705775306e-6,  0.000015252733841557201936, 0.00015403530393370733245, 0.0013333558146406470362,
      0.0096181291076284794928,  0.05550410866482162704,     0.24022650695910071233,    0.69314718055994530925};
  static constexpr double lowest = -1100.0;
};

// n and 2^f - 1 for max(t, lowest).
template <class T>
struct PowerParts {
  Vec<T> integer;
  Vec<T> fraction_minus_1;
};

template <class T>
inline PowerParts<T> split_power(Vec<T> t) {
  // max returns its second operand if either is NaN, so NaN passes through.
  const Vec<T> limited = max(broadcast(Exp2<T>::lowest), t);
  const Vec<T> n = round(limited);
  const Vec<T> f = limited - n;
  Vec<T> p = broadcast(Exp2<T>::coefficients[0]);
  constexpr int count = sizeof(Exp2<T>::coefficients) / sizeof(T);
#pragma GCC unroll 16
  for (int i = 1; i < count; ++i) p = fma(p, f, broadcast(Exp2<T>::coefficients[i]));
  return {n, p * f};
}

// 2^t for t <= 0. Exactly 0 for -inf, NaN for NaN.
template <class T>
inline Vec<T> exp2(Vec<T> t) {
  const PowerParts<T> parts = split_power(t);
  return scale_by_power(parts.fraction_minus_1 + broadcast(T(1)), parts.integer);
}

// tanh with a relative error of a few ulp, even near 0: tanh|x| = -e / (e + 2) with e = exp(-2|x|) - 1.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const PowerParts<T> parts = split_power(abs(x) * broadcast(static_cast<T>(-2.0 * log2_e)));
  const Vec<T> one = broadcast(T(1));
  const Vec<T> e = scale_by_power(parts.fraction_minus_1, parts.integer) + (scale_by_power(one, parts.integer) - one);
  return copy_sign(e / (e + broadcast(T(2))), x);
}

}  // namespace selfattn::SELFATTN_ISA
