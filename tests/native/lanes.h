// What all checks of one instruction set share: numbers to try, and vectors as arrays of lanes.
#pragma once
#include <cstdint>

#include "check.h"
#include "simd/vec.h"

#define SELFATTN_TEXT_(x) #x
#define SELFATTN_TEXT(x) SELFATTN_TEXT_(x)

namespace selfattn::SELFATTN_ISA {

// Only the portable set rounds products before it adds them.
constexpr bool fuses = __builtin_strcmp(SELFATTN_TEXT(SELFATTN_ISA), "portable") != 0;

template <class T>
constexpr T infinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T not_a_number = static_cast<T>(__builtin_nan(""));

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr const char* name = SELFATTN_TEXT(SELFATTN_ISA) " float";
  static constexpr float smallest_normal = __FLT_MIN__, smallest = __FLT_DENORM_MIN__, largest = __FLT_MAX__;
  static constexpr float unit = __FLT_EPSILON__ / 2;
  static constexpr int lowest_power = -126;
};
template <>
struct Limits<double> {
  static constexpr const char* name = SELFATTN_TEXT(SELFATTN_ISA) " double";
  static constexpr double smallest_normal = __DBL_MIN__, smallest = __DBL_DENORM_MIN__, largest = __DBL_MAX__;
  static constexpr double unit = __DBL_EPSILON__ / 2;
  static constexpr int lowest_power = -1022;
};

inline float scalar_fma(float a, float b, float c) { return fuses ? __builtin_fmaf(a, b, c) : a * b + c; }
inline double scalar_fma(double a, double b, double c) { return fuses ? __builtin_fma(a, b, c) : a * b + c; }
inline float scale(float x, int power) { return __builtin_ldexpf(x, power); }
inline double scale(double x, int power) { return __builtin_ldexp(x, power); }

template <class T>
struct Lanes {
  static constexpr int width = Vec<T>::width;
  T lane[width];

  Lanes() = default;
  explicit Lanes(Vec<T> v) { store(lane, v); }
  Vec<T> vec() const { return load(lane); }
};

// Numbers between -2 and 2, the same in every run.
struct Numbers {
  std::uint32_t state = 12345;

  template <class T>
  T next() {
    state = state * 1664525u + 1013904223u;
    return (static_cast<T>(state >> 8) / static_cast<T>(1 << 24) - T(0.5)) * static_cast<T>(1 + (state >> 4) % 4);
  }
};

}  // namespace selfattn::SELFATTN_ISA
