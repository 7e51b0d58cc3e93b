// Activation functions on vectors. Their errors are listed in docs/numerics.md; NaN gives NaN, and infinity gives the
// function's limit.
//
// Exponentials here need a small relative error even where they are tiny. So n * ln 2 is subtracted from the argument
// in two parts. The first part, n * ln2_high, is exact for every n that occurs.
#pragma once
#include "kernels/exp.h"
#include "kernels/kernel_set.h"
#include "kernels/pack.h"

namespace selfattn::SELFATTN_ISA {

// The tail of the normal distribution is Q(a) = e^(-a^2/2) G(a) with a smooth G. `tail` is a polynomial in
// t = (a - centre) / (a + centre) that approximates (a + centre) G(a): it interpolates this function at Chebyshev
// points. Its relative error is 1.3e-8 for float and 5e-19 for double. From a = `beyond` on, Q(a) rounds to 0.
template <class T>
struct Normal;
template <>
struct Normal<float> {
  static constexpr float ln2_high = 0.693138122558593750f, ln2_low = 9.05800061e-6f;
  static constexpr float underflow = 104.0f;  // e^-104 rounds to 0
  static constexpr float beyond = 14.5f, centre = 4;
  static constexpr float tail[] = {
      -0.00012298315700527f, 0.00019480185114247f, 0.0015693136450922f, -0.0035235740563519f, -0.0075272129116799f,
      0.060406469748304f,    -0.18652300589739f,   0.38713667979471f,   -0.60789660607381f,   0.75528513851037f};
};
template <>
struct Normal<double> {
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double underflow = 746.0;
  static constexpr double beyond = 38.6, centre = 5;
  static constexpr double tail[] = {
      -3.8172984174176351695e-10,  -1.1615537585916111963e-9,   2.2198706307107770811e-9,  1.0798252463713859745e-8,
      -8.5526111012509773747e-9,   -7.0141663100849857706e-8,   4.0174370249566009541e-8,  4.3629064090553405063e-7,
      -3.3457168518762364245e-7,   -2.7707187106385778485e-6,   3.9798041733864865804e-6,  0.000016681638804574406155,
      -0.000049762456041908822513, -0.000059375807143884414592, 0.00054489899275142596055, -0.00079786938933054112016,
      -0.002993376761869818739,    0.02079506679926351365,      -0.069118638706877958033,  0.16502036617040700143,
      -0.31353315667128745421,     0.49530561596997607633,      -0.66538250289005685172,   0.76919304975006295951};
};

// e^-(high + low), where high + low is between 0 and slightly more than `underflow`.
template <class T>
inline Vec<T> exp_minus(Vec<T> high, Vec<T> low) {
  const Vec<T> n = round((high + low) * broadcast(static_cast<T>(-log2_e)));
  const Vec<T> rest = fma(n, broadcast(Normal<T>::ln2_high), high) + fma(n, broadcast(Normal<T>::ln2_low), low);
  const Vec<T> f = rest * broadcast(static_cast<T>(-log2_e));
  Vec<T> p = broadcast(Exp2<T>::coefficients[0]);
  constexpr int count = sizeof(Exp2<T>::coefficients) / sizeof(T);
#pragma GCC unroll 16
  for (int i = 1; i < count; ++i) p = fma(p, f, broadcast(Exp2<T>::coefficients[i]));
  return scale_by_power(fma(p, f, broadcast(T(1))), n);
}

// x / (1 + e^-z), where z has the sign of x and |z| >= |x|.
template <class T>
inline Vec<T> gate_by_logistic(Vec<T> x, Vec<T> z) {
  const Vec<T> one = broadcast(T(1)), zero = broadcast(T(0));
  const Vec<T> e = exp_minus(min(broadcast(Normal<T>::underflow), abs(z)), zero);
  return x * select(z < zero, e, one) / (one + e);
}

template <class T>
inline Vec<T> silu(Vec<T> x) {
  const Vec<T> finite = max(broadcast(-Normal<T>::underflow), x);  // for smaller x the result is 0
  return gate_by_logistic(finite, finite);
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
template <class T>
inline Vec<T> gelu_tanh(Vec<T> x) {
  constexpr double slope = 1.5957691216057307117;  // 2 sqrt(2 / pi)
  const Vec<T> finite = max(broadcast(T(-24)), x);
  const Vec<T> factor =
      fma(finite * finite, broadcast(static_cast<T>(0.044715 * slope)), broadcast(static_cast<T>(slope)));
  return gate_by_logistic(finite, finite * factor);
}

// x times the standard normal distribution function, computed as max(x, 0) - a Q(a) with a = |x|. The argument of
// exp_minus has two parts. The first is c^2/2, where c is the multiple of 1/16 that is nearest to `a`. It is exact. The
// second is (a^2 - c^2)/2.
template <class T>
inline Vec<T> gelu(Vec<T> x) {
  const Vec<T> half = broadcast(T(0.5)), centre = broadcast(Normal<T>::centre);
  const Vec<T> a = min(broadcast(Normal<T>::beyond), abs(x));
  const Vec<T> coarse = round(a * broadcast(T(16))) * broadcast(T(1.0 / 16));
  const Vec<T> e = exp_minus(coarse * coarse * half, (a - coarse) * (a + coarse) * half);
  const Vec<T> inverse = broadcast(T(1)) / (a + centre);
  const Vec<T> t = (a - centre) * inverse;
  Vec<T> g = broadcast(Normal<T>::tail[0]);
  constexpr int count = sizeof(Normal<T>::tail) / sizeof(T);
#pragma GCC unroll 32
  for (int i = 1; i < count; ++i) g = fma(g, t, broadcast(Normal<T>::tail[i]));
  return max(x, broadcast(T(0))) - a * (g * inverse * e);
}

template <class T, class F>
inline void apply(T* values, std::int64_t count, F f) {
  for (std::int64_t i = 0; i < count; i += Vec<T>::width)
    store_up_to(values + i, f(load_up_to(values + i, count - i)), count - i);
}

template <class T>
inline void activate(Activation activation, void* values, std::int64_t count) noexcept {
  T* v = static_cast<T*>(values);
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return apply(v, count, [](Vec<T> x) { return max(broadcast(T(0)), x); });
    case Activation::gelu:
      return apply(v, count, [](Vec<T> x) { return gelu(x); });
    case Activation::gelu_tanh:
      return apply(v, count, [](Vec<T> x) { return gelu_tanh(x); });
    case Activation::silu:
      return apply(v, count, [](Vec<T> x) { return silu(x); });
  }
}

}  // namespace selfattn::SELFATTN_ISA
