// Advanced SIMD of AArch64: four floats or two doubles. Every vec_*.h offers these operations.
#pragma once
#if !defined(__aarch64__) || !defined(__ARM_NEON) || defined(__AARCH64EB__)
#error "vec_neon.h needs little-endian AArch64 with Advanced SIMD"
#endif
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "simd/narrow.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int width = 4;
  float32x4_t r;
};
template <>
struct Vec<double> {
  static constexpr int width = 2;
  float64x2_t r;
};

// In each lane, either all bits are set or none.
template <class T>
struct Mask;
template <>
struct Mask<float> {
  uint32x4_t r;
};
template <>
struct Mask<double> {
  uint64x2_t r;
};

using VecF = Vec<float>;
using VecD = Vec<double>;
using MaskF = Mask<float>;
using MaskD = Mask<double>;

// Construction, loads and stores. Partial loads and stores access only the first n lanes (n < width). A partial load
// sets the other lanes to 0.
inline VecF broadcast(float x) { return {vdupq_n_f32(x)}; }
inline VecD broadcast(double x) { return {vdupq_n_f64(x)}; }
inline VecF load(const float* p) { return {vld1q_f32(p)}; }
inline VecD load(const double* p) { return {vld1q_f64(p)}; }
inline VecF load_partial(const float* p, int n) {
  float32x4_t r = vdupq_n_f32(0);
  if (n > 0) r = vld1q_lane_f32(p, r, 0);
  if (n > 1) r = vld1q_lane_f32(p + 1, r, 1);
  if (n > 2) r = vld1q_lane_f32(p + 2, r, 2);
  return {r};
}
inline VecD load_partial(const double* p, int n) {
  const float64x2_t zero = vdupq_n_f64(0);
  return {n > 0 ? vld1q_lane_f64(p, zero, 0) : zero};
}
inline void store(float* p, VecF a) { vst1q_f32(p, a.r); }
inline void store(double* p, VecD a) { vst1q_f64(p, a.r); }
inline void store_partial(float* p, VecF a, int n) {
  if (n > 0) vst1q_lane_f32(p, a.r, 0);
  if (n > 1) vst1q_lane_f32(p + 1, a.r, 1);
  if (n > 2) vst1q_lane_f32(p + 2, a.r, 2);
}
inline void store_partial(double* p, VecD a, int n) {
  if (n > 0) vst1q_lane_f64(p, a.r, 0);
}
// Loads and stores of 16-bit numbers. Stores round to nearest, ties to even. 8-bit codes are only loaded.
inline VecF load(const BFloat* p) {
  uint16x4_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
}
inline VecF load(const Half* p) {
  uint16x4_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return {vcvt_f32_f16(vreinterpret_f16_u16(bits))};
}
inline VecF load(const Int8* p) {
  std::uint32_t codes;
  std::memcpy(&codes, p, sizeof codes);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(codes)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
}
inline void store(BFloat* p, VecF a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.r);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint16x4_t upper = vshrn_n_u32(vbslq_u32(vceqq_f32(a.r, a.r), rounded, quiet), 16);
  std::memcpy(p, &upper, sizeof upper);
}
inline void store(Half* p, VecF a) {
  const uint16x4_t bits = vreinterpret_u16_f16(vcvt_f16_f32(a.r));
  std::memcpy(p, &bits, sizeof bits);
}
// Makes the compiler load a value into a register once. Otherwise it may load the value again before each use.
inline VecF in_register(VecF a) {
  asm("" : "+w"(a.r));
  return a;
}
inline VecD in_register(VecD a) {
  asm("" : "+w"(a.r));
  return a;
}
// Loads two vectors of bfloat16; here in the order of memory.
inline void load_adjacent(const BFloat* p, VecF (&x)[2]) {
  x[0] = load(p);
  x[1] = load(p + VecF::width);
}
inline void put_in_order(VecF (&)[2], BFloat) {}
// 0, 1, 2, ...
inline VecF iota(float) { return {float32x4_t{0, 1, 2, 3}}; }
inline VecD iota(double) { return {float64x2_t{0, 1}}; }

// Arithmetic. max and min return b if either operand is NaN, unlike FMAX and FMIN.
inline VecF operator+(VecF a, VecF b) { return {vaddq_f32(a.r, b.r)}; }
inline VecD operator+(VecD a, VecD b) { return {vaddq_f64(a.r, b.r)}; }
inline VecF operator-(VecF a, VecF b) { return {vsubq_f32(a.r, b.r)}; }
inline VecD operator-(VecD a, VecD b) { return {vsubq_f64(a.r, b.r)}; }
inline VecF operator*(VecF a, VecF b) { return {vmulq_f32(a.r, b.r)}; }
inline VecD operator*(VecD a, VecD b) { return {vmulq_f64(a.r, b.r)}; }
inline VecF operator/(VecF a, VecF b) { return {vdivq_f32(a.r, b.r)}; }
inline VecD operator/(VecD a, VecD b) { return {vdivq_f64(a.r, b.r)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {vfmaq_f32(c.r, a.r, b.r)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {vfmaq_f64(c.r, a.r, b.r)}; }
inline VecF max(VecF a, VecF b) { return {vbslq_f32(vcgtq_f32(a.r, b.r), a.r, b.r)}; }
inline VecD max(VecD a, VecD b) { return {vbslq_f64(vcgtq_f64(a.r, b.r), a.r, b.r)}; }
inline VecF min(VecF a, VecF b) { return {vbslq_f32(vcltq_f32(a.r, b.r), a.r, b.r)}; }
inline VecD min(VecD a, VecD b) { return {vbslq_f64(vcltq_f64(a.r, b.r), a.r, b.r)}; }
inline VecF abs(VecF a) { return {vabsq_f32(a.r)}; }
inline VecD abs(VecD a) { return {vabsq_f64(a.r)}; }
inline VecF copy_sign(VecF size, VecF sign) { return {vbslq_f32(vdupq_n_u32(1u << 31), sign.r, size.r)}; }
inline VecD copy_sign(VecD size, VecD sign) { return {vbslq_f64(vdupq_n_u64(std::uint64_t{1} << 63), sign.r, size.r)}; }

// All comparisons except is_nan are false in lanes where an operand is NaN.
inline MaskF operator<(VecF a, VecF b) { return {vcltq_f32(a.r, b.r)}; }
inline MaskD operator<(VecD a, VecD b) { return {vcltq_f64(a.r, b.r)}; }
inline MaskF operator<=(VecF a, VecF b) { return {vcleq_f32(a.r, b.r)}; }
inline MaskD operator<=(VecD a, VecD b) { return {vcleq_f64(a.r, b.r)}; }
inline MaskF operator==(VecF a, VecF b) { return {vceqq_f32(a.r, b.r)}; }
inline MaskD operator==(VecD a, VecD b) { return {vceqq_f64(a.r, b.r)}; }
inline MaskF is_nan(VecF a) { return {vceqzq_u32(vceqq_f32(a.r, a.r))}; }
inline MaskD is_nan(VecD a) { return {vceqzq_u64(vceqq_f64(a.r, a.r))}; }
inline MaskF operator&(MaskF a, MaskF b) { return {vandq_u32(a.r, b.r)}; }
inline MaskD operator&(MaskD a, MaskD b) { return {vandq_u64(a.r, b.r)}; }
inline MaskF operator|(MaskF a, MaskF b) { return {vorrq_u32(a.r, b.r)}; }
inline MaskD operator|(MaskD a, MaskD b) { return {vorrq_u64(a.r, b.r)}; }
inline bool any(MaskF a) { return vmaxvq_u32(a.r) != 0; }
inline bool any(MaskD a) { return vmaxvq_u32(vreinterpretq_u32_u64(a.r)) != 0; }
inline bool all(MaskF a) { return vminvq_u32(a.r) != 0; }
inline bool all(MaskD a) { return vminvq_u32(vreinterpretq_u32_u64(a.r)) != 0; }
// where ? a : b
inline VecF select(MaskF where, VecF a, VecF b) { return {vbslq_f32(where.r, a.r, b.r)}; }
inline VecD select(MaskD where, VecD a, VecD b) { return {vbslq_f64(where.r, a.r, b.r)}; }

// Steps of exp2. round() rounds to the nearest integer. scale_by_power() returns x * 2^n for an integral n. If x is
// finite and n <= -127 (double: -1023), the result is exactly 0.
inline VecF round(VecF a) { return {vrndnq_f32(a.r)}; }
inline VecD round(VecD a) { return {vrndnq_f64(a.r)}; }
inline VecF scale_by_power(VecF x, VecF n) {
  const int32x4_t e = vcvtq_s32_f32(max(n, broadcast(-127.0f)).r);
  const int32x4_t power = vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23);
  return {vmulq_f32(x.r, vreinterpretq_f32_s32(power))};
}
inline VecD scale_by_power(VecD x, VecD n) {
  const int64x2_t e = vcvtq_s64_f64(max(n, broadcast(-1023.0)).r);
  const int64x2_t power = vshlq_n_s64(vaddq_s64(e, vdupq_n_s64(1023)), 52);
  return {vmulq_f64(x.r, vreinterpretq_f64_s64(power))};
}

// Reductions over lanes, in a fixed order.
inline float reduce_max(VecF a) { return vmaxvq_f32(a.r); }
inline double reduce_max(VecD a) { return vmaxvq_f64(a.r); }
inline float reduce_sum(VecF a) { return vaddvq_f32(a.r); }
inline double reduce_sum(VecD a) { return vaddvq_f64(a.r); }

// Lane i of the result is the sum of the lanes of v[i].
inline VecF reduce_sums(const VecF (&v)[4]) {
  return {vpaddq_f32(vpaddq_f32(v[0].r, v[1].r), vpaddq_f32(v[2].r, v[3].r))};
}
inline VecD reduce_sums(const VecD (&v)[2]) { return {vpaddq_f64(v[0].r, v[1].r)}; }

// Loads bytes of a boolean array: 0 where the byte is nonzero (visible), -inf where it is zero (hidden).
inline VecF load_hidden(const std::uint8_t* p, float) {
  std::uint32_t four;
  std::memcpy(&four, p, sizeof four);
  const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
  const uint32x4_t hidden = vceqzq_u32(vmovl_u16(vget_low_u16(wide)));
  return {vreinterpretq_f32_u32(vandq_u32(hidden, vreinterpretq_u32_f32(vdupq_n_f32(-__builtin_inff()))))};
}
inline VecD load_hidden(const std::uint8_t* p, double) {
  const uint64x2_t bytes = {p[0], p[1]};
  const uint64x2_t hidden = vceqzq_u64(bytes);
  return {vreinterpretq_f64_u64(vandq_u64(hidden, vreinterpretq_u64_f64(vdupq_n_f64(-__builtin_inf()))))};
}

inline VecF reverse(VecF a) {
  const float32x4_t pairs = vrev64q_f32(a.r);
  return {vextq_f32(pairs, pairs, 2)};
}
inline VecD reverse(VecD a) { return {vextq_f64(a.r, a.r, 1)}; }

// Transposes a square matrix; each vector is a row.
inline void transpose(VecF (&v)[4]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(v[0].r, v[1].r));  // interleaves pairs of rows
  const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(v[0].r, v[1].r));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(v[2].r, v[3].r));
  const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(v[2].r, v[3].r));
  v[0].r = vreinterpretq_f32_f64(vtrn1q_f64(a, c));  // joins pairs of floats to columns of four rows
  v[1].r = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  v[2].r = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  v[3].r = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}
inline void transpose(VecD (&v)[2]) {
  const float64x2_t a = v[0].r;
  v[0].r = vtrn1q_f64(a, v[1].r);
  v[1].r = vtrn2q_f64(a, v[1].r);
}

// 32-bit words in the lower halves of 64-bit lanes. All operations except upper_half ignore the upper halves.
struct Words {
  static constexpr int width = 2;
  uint64x2_t r;
};
inline Words broadcast_word(std::uint32_t x) { return {vdupq_n_u64(x)}; }
inline Words load_words(const std::uint32_t* p) { return {vmovl_u32(vld1_u32(p))}; }
inline void store_words(std::uint32_t* p, Words a) { vst1_u32(p, vmovn_u64(a.r)); }
inline Words operator^(Words a, Words b) { return {veorq_u64(a.r, b.r)}; }
// multiply gives 64-bit products. The lower half of a product is a word already; upper_half moves the upper half there.
inline Words multiply(Words a, Words b) { return {vmull_u32(vmovn_u64(a.r), vmovn_u64(b.r))}; }
inline Words upper_half(Words a) { return {vshrq_n_u64(a.r, 32)}; }
// Whether each word is at least `limit`.
inline MaskF at_least(const Words (&a)[2], std::uint32_t limit) {
  return {vcgeq_u32(vcombine_u32(vmovn_u64(a[0].r), vmovn_u64(a[1].r)), vdupq_n_u32(limit))};
}
inline MaskD at_least(const Words (&a)[1], std::uint32_t limit) {
  return {vcgeq_u64(vandq_u64(a[0].r, vdupq_n_u64(0xffffffff)), vdupq_n_u64(limit))};
}

}  // namespace selfattn::SELFATTN_ISA
