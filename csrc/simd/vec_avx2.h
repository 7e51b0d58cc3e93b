// AVX2 and FMA: eight floats or four doubles. Every vec_*.h offers these operations.
#pragma once
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "vec_avx2.h needs AVX2, FMA and F16C"
#endif
#include <immintrin.h>

#include <cstdint>

#include "simd/narrow.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int width = 8;
  __m256 r;
};
template <>
struct Vec<double> {
  static constexpr int width = 4;
  __m256d r;
};

// In each lane, either all bits are set or none.
template <class T>
struct Mask;
template <>
struct Mask<float> {
  __m256 r;
};
template <>
struct Mask<double> {
  __m256d r;
};

using VecF = Vec<float>;
using VecD = Vec<double>;
using MaskF = Mask<float>;
using MaskD = Mask<double>;

inline __m256i first_lanes_f32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_lanes_f64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

// Construction, loads and stores. Partial loads and stores access only the first n lanes (n < width). A partial load
// sets the other lanes to 0.
inline VecF broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline VecD broadcast(double x) { return {_mm256_set1_pd(x)}; }
inline VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline VecF load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes_f32(n))}; }
inline VecD load_partial(const double* p, int n) { return {_mm256_maskload_pd(p, first_lanes_f64(n))}; }
inline void store(float* p, VecF a) { _mm256_storeu_ps(p, a.r); }
inline void store(double* p, VecD a) { _mm256_storeu_pd(p, a.r); }
inline void store_partial(float* p, VecF a, int n) { _mm256_maskstore_ps(p, first_lanes_f32(n), a.r); }
inline void store_partial(double* p, VecD a, int n) { _mm256_maskstore_pd(p, first_lanes_f64(n), a.r); }
// Loads and stores of 16-bit numbers. Stores round to nearest, ties to even. 8-bit codes are only loaded.
inline VecF load(const BFloat* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline VecF load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline VecF load(const Int8* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(BFloat* p, VecF a) {
  const __m256i bits = _mm256_castps_si256(a.r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.r, a.r, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x88);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Half* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.r, _MM_FROUND_TO_NEAREST_INT));
}
// Makes the compiler load a value into a register once. Otherwise it tends to load the value again in each instruction
// that uses it.
inline VecF in_register(VecF a) {
  asm("" : "+x"(a.r));
  return a;
}
inline VecD in_register(VecD a) {
  asm("" : "+x"(a.r));
  return a;
}
// Loads two vectors of bfloat16: the numbers at even indices, which only need a shift, and those at odd indices, which
// only need a bitwise AND.
inline void load_adjacent(const BFloat* p, VecF (&x)[2]) {
  const __m256i bits = _mm256_castps_si256(in_register(VecF{_mm256_loadu_ps(reinterpret_cast<const float*>(p))}).r);
  x[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  x[1] = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-0x10000)))};
}
inline void put_in_order(VecF (&x)[2], BFloat) {
  const __m256 low = _mm256_unpacklo_ps(x[0].r, x[1].r), high = _mm256_unpackhi_ps(x[0].r, x[1].r);
  x[0] = {_mm256_permute2f128_ps(low, high, 0x20)};
  x[1] = {_mm256_permute2f128_ps(low, high, 0x31)};
}
// 0, 1, 2, ...
inline VecF iota(float) { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
inline VecD iota(double) { return {_mm256_setr_pd(0, 1, 2, 3)}; }

// Arithmetic. max and min return b if either operand is NaN.
inline VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.r, b.r)}; }
inline VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.r, b.r)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.r, b.r)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.r, b.r)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.r, b.r)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.r, b.r)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.r, b.r)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.r, b.r)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.r, b.r, c.r)}; }
inline VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.r, b.r)}; }
inline VecD max(VecD a, VecD b) { return {_mm256_max_pd(a.r, b.r)}; }
inline VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.r, b.r)}; }
inline VecD min(VecD a, VecD b) { return {_mm256_min_pd(a.r, b.r)}; }
inline VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.r)}; }
inline VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.r)}; }
inline VecF copy_sign(VecF size, VecF sign) {
  return {_mm256_or_ps(abs(size).r, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.r))};
}
inline VecD copy_sign(VecD size, VecD sign) {
  return {_mm256_or_pd(abs(size).r, _mm256_and_pd(_mm256_set1_pd(-0.0), sign.r))};
}

// All comparisons except is_nan are false in lanes where an operand is NaN.
inline MaskF operator<(VecF a, VecF b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ)}; }
inline MaskD operator<(VecD a, VecD b) { return {_mm256_cmp_pd(a.r, b.r, _CMP_LT_OQ)}; }
inline MaskF operator<=(VecF a, VecF b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LE_OQ)}; }
inline MaskD operator<=(VecD a, VecD b) { return {_mm256_cmp_pd(a.r, b.r, _CMP_LE_OQ)}; }
inline MaskF operator==(VecF a, VecF b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_EQ_OQ)}; }
inline MaskD operator==(VecD a, VecD b) { return {_mm256_cmp_pd(a.r, b.r, _CMP_EQ_OQ)}; }
inline MaskF is_nan(VecF a) { return {_mm256_cmp_ps(a.r, a.r, _CMP_UNORD_Q)}; }
inline MaskD is_nan(VecD a) { return {_mm256_cmp_pd(a.r, a.r, _CMP_UNORD_Q)}; }
inline MaskF operator&(MaskF a, MaskF b) { return {_mm256_and_ps(a.r, b.r)}; }
inline MaskD operator&(MaskD a, MaskD b) { return {_mm256_and_pd(a.r, b.r)}; }
inline MaskF operator|(MaskF a, MaskF b) { return {_mm256_or_ps(a.r, b.r)}; }
inline MaskD operator|(MaskD a, MaskD b) { return {_mm256_or_pd(a.r, b.r)}; }
inline bool any(MaskF a) { return _mm256_movemask_ps(a.r) != 0; }
inline bool any(MaskD a) { return _mm256_movemask_pd(a.r) != 0; }
inline bool all(MaskF a) { return _mm256_movemask_ps(a.r) == 0xff; }
inline bool all(MaskD a) { return _mm256_movemask_pd(a.r) == 0xf; }
// where ? a : b
inline VecF select(MaskF where, VecF a, VecF b) { return {_mm256_blendv_ps(b.r, a.r, where.r)}; }
inline VecD select(MaskD where, VecD a, VecD b) { return {_mm256_blendv_pd(b.r, a.r, where.r)}; }

// Steps of exp2. round() rounds to the nearest integer. scale_by_power() returns x * 2^n for an integral n. If x is
// finite and n <= -127 (double: -1023), the result is exactly 0.
inline VecF round(VecF a) { return {_mm256_round_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecD round(VecD a) { return {_mm256_round_pd(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecF scale_by_power(VecF x, VecF n) {
  const __m256i e = _mm256_cvtps_epi32(_mm256_max_ps(n.r, _mm256_set1_ps(-127.0f)));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.r, _mm256_castsi256_ps(power))};
}
inline VecD scale_by_power(VecD x, VecD n) {
  const __m128i e = _mm256_cvtpd_epi32(_mm256_max_pd(n.r, _mm256_set1_pd(-1023.0)));
  const __m256i biased = _mm256_add_epi64(_mm256_cvtepi32_epi64(e), _mm256_set1_epi64x(1023));
  return {_mm256_mul_pd(x.r, _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52)))};
}

// Reductions over lanes, in a fixed order.
inline float reduce_max(VecF a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline double reduce_max(VecD a) {
  const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(a.r), _mm256_extractf128_pd(a.r, 1));
  return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
}
inline float reduce_sum(VecF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline double reduce_sum(VecD a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.r), _mm256_extractf128_pd(a.r, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

// Lane i of the result is the sum of the lanes of v[i].
inline VecF reduce_sums(const VecF (&v)[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0].r, v[1].r), _mm256_hadd_ps(v[2].r, v[3].r));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4].r, v[5].r), _mm256_hadd_ps(v[6].r, v[7].r));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}
inline VecD reduce_sums(const VecD (&v)[4]) {
  const __m256d a = _mm256_hadd_pd(v[0].r, v[1].r);
  const __m256d b = _mm256_hadd_pd(v[2].r, v[3].r);
  return {_mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31))};
}

// Loads bytes of a boolean array: 0 where the byte is nonzero (visible), -inf where it is zero (hidden).
inline VecF load_hidden(const std::uint8_t* p, float) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256 hidden = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bytes, _mm256_setzero_si256()));
  return {_mm256_and_ps(hidden, _mm256_set1_ps(-__builtin_inff()))};
}
inline VecD load_hidden(const std::uint8_t* p, double) {
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_loadu_si32(p));
  const __m256d hidden = _mm256_castsi256_pd(_mm256_cmpeq_epi64(bytes, _mm256_setzero_si256()));
  return {_mm256_and_pd(hidden, _mm256_set1_pd(-__builtin_inf()))};
}

inline VecF reverse(VecF a) { return {_mm256_permutevar8x32_ps(a.r, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0))}; }
inline VecD reverse(VecD a) { return {_mm256_permute4x64_pd(a.r, 0x1b)}; }

// Transposes a square matrix; each vector is a row.
inline void transpose(VecF (&v)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {  // interleaves pairs of rows, float by float
    t[i] = _mm256_unpacklo_ps(v[i].r, v[i + 1].r);
    t[i + 1] = _mm256_unpackhi_ps(v[i].r, v[i + 1].r);
  }
  __m256 u[8];
  for (int i = 0; i < 8; i += 4) {  // joins pairs of floats: each 128-bit half has one column of four rows
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // exchanges 128-bit halves
    v[i].r = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4].r = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
inline void transpose(VecD (&v)[4]) {
  const __m256d a = _mm256_unpacklo_pd(v[0].r, v[1].r);
  const __m256d b = _mm256_unpackhi_pd(v[0].r, v[1].r);
  const __m256d c = _mm256_unpacklo_pd(v[2].r, v[3].r);
  const __m256d d = _mm256_unpackhi_pd(v[2].r, v[3].r);
  v[0].r = _mm256_permute2f128_pd(a, c, 0x20);
  v[1].r = _mm256_permute2f128_pd(b, d, 0x20);
  v[2].r = _mm256_permute2f128_pd(a, c, 0x31);
  v[3].r = _mm256_permute2f128_pd(b, d, 0x31);
}

// 32-bit words in the lower halves of 64-bit lanes. All operations except upper_half ignore the upper halves.
struct Words {
  static constexpr int width = 4;
  __m256i r;
};
inline Words broadcast_word(std::uint32_t x) { return {_mm256_set1_epi64x(x)}; }
inline Words load_words(const std::uint32_t* p) {
  return {_mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_words(std::uint32_t* p, Words a) {
  const __m256i even = _mm256_permutevar8x32_epi32(a.r, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(even));
}
inline Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.r, b.r)}; }
// multiply gives 64-bit products. The lower half of a product is a word already; upper_half moves the upper half there.
inline Words multiply(Words a, Words b) { return {_mm256_mul_epu32(a.r, b.r)}; }
inline Words upper_half(Words a) { return {_mm256_srli_epi64(a.r, 32)}; }
// Whether each word is at least `limit`.
inline MaskF at_least(const Words (&a)[2], std::uint32_t limit) {
  const __m256 pairs = _mm256_shuffle_ps(_mm256_castsi256_ps(a[0].r), _mm256_castsi256_ps(a[1].r), 0x88);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_castps_si256(pairs), 0xd8);
  const __m256i larger = _mm256_max_epu32(words, _mm256_set1_epi32(static_cast<int>(limit)));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(larger, words))};
}
inline MaskD at_least(const Words (&a)[1], std::uint32_t limit) {
  const __m256i words = _mm256_shuffle_epi32(a[0].r, 0xa0);  // each word in both halves of its lane
  const __m256i larger = _mm256_max_epu32(words, _mm256_set1_epi32(static_cast<int>(limit)));
  return {_mm256_castsi256_pd(_mm256_cmpeq_epi32(larger, words))};
}

}  // namespace selfattn::SELFATTN_ISA
