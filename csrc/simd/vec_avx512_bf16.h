// AVX-512 with dot products of bfloat16: the operations of vec_avx512.h, and operations on cells. A cell is a 32-bit
// lane that holds two adjacent bfloat16 numbers, the first one in the lower half. Subnormal numbers count as 0 in
// products.
#pragma once
#if !defined(__AVX512BF16__)
#error "vec_avx512_bf16.h needs AVX-512 BF16"
#endif
#include "simd/vec_avx512.h"

namespace selfattn::SELFATTN_ISA {

// sum + a.first * b.first + a.second * b.second, per cell
inline VecF add_products(VecF a, VecF b, VecF sum) {
#if defined(__clang__)
  // Clang 16 crashes when it fuses the intrinsic with a broadcast from memory.
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.r) : "v"(a.r), "v"(b.r));
  return sum;
#else
  return {_mm512_dpbf16_ps(sum.r, reinterpret_cast<__m512bh>(a.r), reinterpret_cast<__m512bh>(b.r))};
#endif
}

// Loads sixteen cells from 32 adjacent numbers in memory. If n < 32, only the first n numbers are read, and the others
// are 0.
inline VecF load_cells(const BFloat* p, std::int64_t n) {
  const __mmask32 present = n < 32 ? (1u << n) - 1u : ~0u;
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(present, p))};
}

// Makes cells from two vectors: cell i holds lane i of `first` and lane i of `second`, rounded to nearest.
inline VecF to_cells(VecF first, VecF second) {
  const __m512i order =
      _mm512_setr_epi32(0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006, 0x00170007,
                        0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f);
  const __m512bh halves = _mm512_cvtne2ps_pbh(second.r, first.r);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves)))};
}

// Makes cells from two rows of 32 numbers, each loaded by load_cells: each cell has one number of each row. The first
// sixteen cells go to `low`, the other sixteen to `high`.
inline void join_cells(VecF first, VecF second, VecF& low, VecF& high) {
  const __m512i a = _mm512_castps_si512(first.r), b = _mm512_castps_si512(second.r);
  const __m512i order =
      _mm512_setr_epi32(0x00200000, 0x00210001, 0x00220002, 0x00230003, 0x00240004, 0x00250005, 0x00260006, 0x00270007,
                        0x00280008, 0x00290009, 0x002a000a, 0x002b000b, 0x002c000c, 0x002d000d, 0x002e000e, 0x002f000f);
  low = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, order, b))};
  high = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b))};
}

// The smallest and largest absolute values of numbers in cells, except 0. Both are stored as bits shifted left by 1, so
// that the sign is lost; `least` is 1 less, so that 0 becomes the largest number.
struct CellSizes {
  __m512i least = _mm512_set1_epi16(-1), most = _mm512_setzero_si512();

  void include(VecF cells) {
    const __m512i bits = _mm512_castps_si512(cells.r);
    const __m512i twice = _mm512_add_epi16(bits, bits);
    most = _mm512_max_epu16(most, twice);
    least = _mm512_min_epu16(least, _mm512_sub_epi16(twice, _mm512_set1_epi16(1)));
  }
  // Whether each number is finite, and its absolute value is either 0 or at least `limit`.
  bool within(float limit) const {
    const auto lowest = static_cast<short>((bits_of(limit) >> 15) - 1);
    const __mmask32 unbounded = _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(static_cast<short>(0xff00)));
    return (unbounded | _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(lowest))) == 0;
  }
};

// Makes cells from 32 adjacent numbers, of which `low` holds the first 16, rounded to nearest.
inline VecF to_cells_in_order(VecF low, VecF high) {
  return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high.r, low.r))};
}

// Stores the first eight cells to `low` and the other eight to `high`.
inline void store_halves(float* low, float* high, VecF cells) {
  _mm256_storeu_ps(low, _mm512_castps512_ps256(cells.r));
  _mm256_storeu_ps(high, _mm512_extractf32x8_ps(cells.r, 1));
}

// Rounds to the nearest bfloat16. Overflow gives Inf, and subnormal numbers give 0.
inline VecF round_to_bfloat(VecF a) {
  const __m512i bits = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.r)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}

inline VecF first_of(VecF cells) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(cells.r), 16))}; }
inline VecF second_of(VecF cells) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(cells.r), _mm512_set1_epi32(-0x10000)))};
}

}  // namespace selfattn::SELFATTN_ISA
