// AVX-512: sixteen floats or eight doubles. Every vec_*.h offers these operations.
#pragma once
#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__) || !defined(__AVX512BW__)
#error "vec_avx512.h needs AVX-512 F, DQ, BW and VL"
#endif
#include <immintrin.h>

#include <cstdint>

#include "simd/narrow.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int width = 16;
  __m512 r;
};
template <>
struct Vec<double> {
  static constexpr int width = 8;
  __m512d r;
};

// A mask has one bit per lane.
template <class T>
struct Mask;
template <>
struct Mask<float> {
  __mmask16 r;
};
template <>
struct Mask<double> {
  __mmask8 r;
};

using VecF = Vec<float>;
using VecD = Vec<double>;
using MaskF = Mask<float>;
using MaskD = Mask<double>;

inline MaskF first_lanes_f32(int n) { return {static_cast<__mmask16>((1u << n) - 1u)}; }
inline MaskD first_lanes_f64(int n) { return {static_cast<__mmask8>((1u << n) - 1u)}; }

// Construction, loads and stores. Partial loads and stores access only the first n lanes (n < width). A partial load
// sets the other lanes to 0.
inline VecF broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline VecD broadcast(double x) { return {_mm512_set1_pd(x)}; }
inline VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline VecF load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes_f32(n).r, p)}; }
inline VecD load_partial(const double* p, int n) { return {_mm512_maskz_loadu_pd(first_lanes_f64(n).r, p)}; }
inline void store(float* p, VecF a) { _mm512_storeu_ps(p, a.r); }
inline void store(double* p, VecD a) { _mm512_storeu_pd(p, a.r); }
inline void store_partial(float* p, VecF a, int n) { _mm512_mask_storeu_ps(p, first_lanes_f32(n).r, a.r); }
inline void store_partial(double* p, VecD a, int n) { _mm512_mask_storeu_pd(p, first_lanes_f64(n).r, a.r); }
// Loads and stores of 16-bit numbers. Stores round to nearest, ties to even. 8-bit codes are only loaded.
inline VecF load(const BFloat* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline VecF load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline VecF load(const Int8* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(BFloat* p, VecF a) {
  const __m512i bits = _mm512_castps_si512(a.r);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i upper = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
}
inline void store(Half* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.r, _MM_FROUND_TO_NEAREST_INT));
}
// Makes the compiler load a value into a register once. Otherwise it tends to load the value again in each instruction
// that uses it.
inline VecF in_register(VecF a) {
  asm("" : "+v"(a.r));
  return a;
}
inline VecD in_register(VecD a) {
  asm("" : "+v"(a.r));
  return a;
}
// Loads two vectors of bfloat16: the numbers at even indices, which only need a shift, and those at odd indices, which
// only need a bitwise AND.
inline void load_adjacent(const BFloat* p, VecF (&x)[2]) {
  const __m512i bits = _mm512_castps_si512(in_register(VecF{_mm512_loadu_ps(reinterpret_cast<const float*>(p))}).r);
  x[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  x[1] = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)))};
}
inline void put_in_order(VecF (&x)[2], BFloat) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 even = x[0].r, odd = x[1].r;
  x[0] = {_mm512_permutex2var_ps(even, low, odd)};
  x[1] = {_mm512_permutex2var_ps(even, high, odd)};
}
// 0, 1, 2, ...
inline VecF iota(float) { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
inline VecD iota(double) { return {_mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7)}; }

// Arithmetic. max and min return b if either operand is NaN.
inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.r, b.r)}; }
inline VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.r, b.r)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.r, b.r)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.r, b.r)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.r, b.r)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.r, b.r)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.r, b.r)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.r, b.r)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.r, b.r, c.r)}; }
inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.r, b.r)}; }
inline VecD max(VecD a, VecD b) { return {_mm512_max_pd(a.r, b.r)}; }
inline VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.r, b.r)}; }
inline VecD min(VecD a, VecD b) { return {_mm512_min_pd(a.r, b.r)}; }
inline VecF abs(VecF a) { return {_mm512_abs_ps(a.r)}; }
inline VecD abs(VecD a) { return {_mm512_abs_pd(a.r)}; }
inline VecF copy_sign(VecF size, VecF sign) {
  return {_mm512_or_ps(_mm512_abs_ps(size.r), _mm512_and_ps(_mm512_set1_ps(-0.0f), sign.r))};
}
inline VecD copy_sign(VecD size, VecD sign) {
  return {_mm512_or_pd(_mm512_abs_pd(size.r), _mm512_and_pd(_mm512_set1_pd(-0.0), sign.r))};
}

// All comparisons except is_nan are false in lanes where an operand is NaN.
inline MaskF operator<(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ)}; }
inline MaskD operator<(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.r, b.r, _CMP_LT_OQ)}; }
inline MaskF operator<=(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LE_OQ)}; }
inline MaskD operator<=(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.r, b.r, _CMP_LE_OQ)}; }
inline MaskF operator==(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_EQ_OQ)}; }
inline MaskD operator==(VecD a, VecD b) { return {_mm512_cmp_pd_mask(a.r, b.r, _CMP_EQ_OQ)}; }
inline MaskF is_nan(VecF a) { return {_mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q)}; }
inline MaskD is_nan(VecD a) { return {_mm512_cmp_pd_mask(a.r, a.r, _CMP_UNORD_Q)}; }
inline MaskF operator&(MaskF a, MaskF b) { return {static_cast<__mmask16>(a.r & b.r)}; }
inline MaskD operator&(MaskD a, MaskD b) { return {static_cast<__mmask8>(a.r & b.r)}; }
inline MaskF operator|(MaskF a, MaskF b) { return {static_cast<__mmask16>(a.r | b.r)}; }
inline MaskD operator|(MaskD a, MaskD b) { return {static_cast<__mmask8>(a.r | b.r)}; }
inline bool any(MaskF a) { return a.r != 0; }
inline bool any(MaskD a) { return a.r != 0; }
inline bool all(MaskF a) { return a.r == 0xffff; }
inline bool all(MaskD a) { return a.r == 0xff; }
// where ? a : b
inline VecF select(MaskF where, VecF a, VecF b) { return {_mm512_mask_blend_ps(where.r, b.r, a.r)}; }
inline VecD select(MaskD where, VecD a, VecD b) { return {_mm512_mask_blend_pd(where.r, b.r, a.r)}; }

// Steps of exp2. round() rounds to the nearest integer. scale_by_power() returns x * 2^n for an integral n. Results may
// be subnormal.
inline VecF round(VecF a) { return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecD round(VecD a) { return {_mm512_roundscale_pd(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecF scale_by_power(VecF x, VecF n) { return {_mm512_scalef_ps(x.r, n.r)}; }
inline VecD scale_by_power(VecD x, VecD n) { return {_mm512_scalef_pd(x.r, n.r)}; }

// Reductions over lanes, in a fixed order.
inline float reduce_max(VecF a) { return _mm512_reduce_max_ps(a.r); }
inline double reduce_max(VecD a) { return _mm512_reduce_max_pd(a.r); }
inline float reduce_sum(VecF a) { return _mm512_reduce_add_ps(a.r); }
inline double reduce_sum(VecD a) { return _mm512_reduce_add_pd(a.r); }

// Lane i of the result is the sum of the lanes of v[i]: 45 instructions for 16 sums, where 16 separate
// reductions take 112.
inline VecF reduce_sums(const VecF (&v)[16]) {
  __m512 s[4];
  for (int i = 0; i < 4; ++i) {
    const VecF* q = v + 4 * i;
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(q[0].r, q[1].r), _mm512_unpackhi_ps(q[0].r, q[1].r));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(q[2].r, q[3].r), _mm512_unpackhi_ps(q[2].r, q[3].r));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    s[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  }
  const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x88), _mm512_shuffle_f32x4(s[0], s[1], 0xdd));
  const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(s[2], s[3], 0x88), _mm512_shuffle_f32x4(s[2], s[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd))};
}
inline VecD reduce_sums(const VecD (&v)[8]) {
  __m512d s[4];
  for (int i = 0; i < 4; ++i) {
    const VecD* q = v + 2 * i;
    s[i] = _mm512_add_pd(_mm512_unpacklo_pd(q[0].r, q[1].r), _mm512_unpackhi_pd(q[0].r, q[1].r));
  }
  const __m512d x = _mm512_add_pd(_mm512_shuffle_f64x2(s[0], s[1], 0x88), _mm512_shuffle_f64x2(s[0], s[1], 0xdd));
  const __m512d y = _mm512_add_pd(_mm512_shuffle_f64x2(s[2], s[3], 0x88), _mm512_shuffle_f64x2(s[2], s[3], 0xdd));
  return {_mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x88), _mm512_shuffle_f64x2(x, y, 0xdd))};
}

// Loads bytes of a boolean array: 0 where the byte is nonzero (visible), -inf where it is zero (hidden).
inline VecF load_hidden(const std::uint8_t* p, float) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __mmask16 hidden = _mm_cmpeq_epi8_mask(bytes, _mm_setzero_si128());
  return {_mm512_maskz_mov_ps(hidden, _mm512_set1_ps(-__builtin_inff()))};
}
inline VecD load_hidden(const std::uint8_t* p, double) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __mmask16 hidden = _mm_cmpeq_epi8_mask(bytes, _mm_setzero_si128());
  return {_mm512_maskz_mov_pd(static_cast<__mmask8>(hidden), _mm512_set1_pd(-__builtin_inf()))};
}

inline VecF reverse(VecF a) {
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), a.r)};
}
inline VecD reverse(VecD a) { return {_mm512_permutexvar_pd(_mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0), a.r)}; }

// Transposes a square matrix; each vector is a row.
inline void transpose(VecF (&v)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {  // interleaves pairs of rows, float by float
    t[i] = _mm512_unpacklo_ps(v[i].r, v[i + 1].r);
    t[i + 1] = _mm512_unpackhi_ps(v[i].r, v[i + 1].r);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {  // joins pairs of floats: each 128-bit lane has one column of four rows
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  for (int i = 0; i < 4; ++i) {  // rearranges 128-bit lanes
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    v[i].r = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 8].r = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[i + 4].r = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 12].r = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
inline void transpose(VecD (&v)[8]) {
  __m512d t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(v[i].r, v[i + 1].r);
    t[i + 1] = _mm512_unpackhi_pd(v[i].r, v[i + 1].r);
  }
  for (int i = 0; i < 2; ++i) {  // rearranges 128-bit lanes
    const __m512d a = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    const __m512d b = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    const __m512d c = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    const __m512d d = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    v[i].r = _mm512_shuffle_f64x2(a, c, 0x88);
    v[i + 4].r = _mm512_shuffle_f64x2(a, c, 0xdd);
    v[i + 2].r = _mm512_shuffle_f64x2(b, d, 0x88);
    v[i + 6].r = _mm512_shuffle_f64x2(b, d, 0xdd);
  }
}

// 32-bit words in the lower halves of 64-bit lanes. All operations except upper_half ignore the upper halves.
struct Words {
  static constexpr int width = 8;
  __m512i r;
};
inline Words broadcast_word(std::uint32_t x) { return {_mm512_set1_epi64(x)}; }
inline Words load_words(const std::uint32_t* p) {
  return {_mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_words(std::uint32_t* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a.r));
}
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.r, b.r)}; }
// multiply gives 64-bit products. The lower half of a product is a word already; upper_half moves the upper half there.
inline Words multiply(Words a, Words b) { return {_mm512_mul_epu32(a.r, b.r)}; }
inline Words upper_half(Words a) { return {_mm512_srli_epi64(a.r, 32)}; }
// Whether each word is at least `limit`.
inline MaskF at_least(const Words (&a)[2], std::uint32_t limit) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i words = _mm512_permutex2var_epi32(a[0].r, even, a[1].r);
  return {_mm512_cmpge_epu32_mask(words, _mm512_set1_epi32(static_cast<int>(limit)))};
}
inline MaskD at_least(const Words (&a)[1], std::uint32_t limit) {
  return {_mm256_cmpge_epu32_mask(_mm512_cvtepi64_epi32(a[0].r), _mm256_set1_epi32(static_cast<int>(limit)))};
}

}  // namespace selfattn::SELFATTN_ISA
