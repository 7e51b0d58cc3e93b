// Numbers of 16, 8 and 4 bits in memory. They are converted to float for computation.
#pragma once
#include <cstdint>
#include <cstring>

namespace selfattn::SELFATTN_ISA {

struct Half {  // IEEE 754 binary16
  std::uint16_t bits;
};
struct BFloat {  // the upper half of a float
  std::uint16_t bits;
};

struct Int8 {  // a code; the number is code * scale, and scales are stored separately
  std::int8_t code;
};

// A word of 4-bit codes, a group of numbers with its own step and zero: a number is multiple * (code - zero) * scale.
// The integer multiple * (code - zero) fits in an Int8, whatever the bytes are.
struct Int4 {
  static constexpr int elements = 32, half = 16, most_multiple = 8;
  std::uint8_t codes[half];  // of elements i (low bits) and half + i (high bits)
  std::uint8_t group;        // multiple - 1 (3 bits), one bit that is not used, zero (4 bits)

  static std::uint8_t group_of(int multiple, int zero) { return static_cast<std::uint8_t>((multiple - 1) | zero << 4); }
  int multiple() const { return (group & 7) + 1; }
  int zero() const { return group >> 4; }
  void set(int element, int code) {
    std::uint8_t& pair = codes[element % half];
    pair = static_cast<std::uint8_t>(pair | code << (element < half ? 0 : 4));
  }
};
static_assert(sizeof(Int4) == Int4::half + 1);

inline void unpack(const Int4& word, Int8* to) {
  const int multiple = word.multiple(), zero = word.zero();
  for (int i = 0; i < Int4::half; ++i) {
    to[i].code = static_cast<std::int8_t>(multiple * ((word.codes[i] & 15) - zero));
    to[i + Int4::half].code = static_cast<std::int8_t>(multiple * ((word.codes[i] >> 4) - zero));
  }
}

// An element of the caller's memory, which may be misaligned.
template <class T>
inline T element_at(const T* p) {
  T element;
  std::memcpy(&element, p, sizeof element);
  return element;
}

inline float widen(float x) { return x; }
inline float widen(Int8 x) { return static_cast<float>(x.code); }

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(BFloat x) { return float_of(std::uint32_t{x.bits} << 16); }

inline float widen(Half x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16, exponent = x.bits >> 10 & 31,
                      fraction = x.bits & 1023;
  if (exponent == 31)  // Inf, or NaN, which is made quiet
    return float_of(sign | 0x7f800000u | fraction << 13 | (fraction != 0 ? 0x400000u : 0u));
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
}

// to_bfloat and to_half round to nearest, ties to even. Overflow gives Inf.
inline BFloat to_bfloat(float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t upper = x != x ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<std::uint16_t>(upper)};
}

inline Half to_half(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  std::uint32_t half;
  if (size > 0x7f800000u)
    half = 0x7e00u | (size >> 13 & 1023u);
  else if (size >= 0x477ff000u)  // rounds to 65536 or more: overflow
    half = 0x7c00u;
  else if (size < 0x38800000u)  // subnormal: adding 0.5 rounds to a multiple of 2^-24
    half = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  else
    half = (size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13;
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace selfattn::SELFATTN_ISA
