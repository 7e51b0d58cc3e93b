// Vectors of bytes, and their products with AVX512_VNNI.
#pragma once
#if !defined(__AVX512VNNI__)
#error "bytes_avx512.h needs AVX-512 VNNI"
#endif
#include "simd/vec_avx512.h"

namespace selfattn::SELFATTN_ISA {

struct Bytes {
  static constexpr int width = 64;
  __m512i r;
};
template <>
struct Vec<std::int32_t> {
  static constexpr int width = 16;
  __m512i r;
};
using Integers = Vec<std::int32_t>;

inline Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
// The first n < 64 bytes; the others are 0.
inline Bytes load_bytes(const void* p, std::int64_t n) {
  return {_mm512_maskz_loadu_epi8((std::uint64_t{1} << n) - 1, p)};
}
inline void store_bytes(void* p, Bytes a) { _mm512_storeu_si512(p, a.r); }
inline Bytes in_register(Bytes a) {
  asm("" : "+v"(a.r));
  return a;
}
// Adds 128 to signed bytes. The results are unsigned.
inline Bytes plus_128(Bytes a) { return {_mm512_xor_si512(a.r, _mm512_set1_epi8(-128))}; }
// The same four bytes in every cell. A cell has four bytes, a quarter has four cells.
inline Bytes broadcast_cell(std::int32_t cell) { return {_mm512_set1_epi32(cell)}; }
inline Bytes broadcast_cell(const std::uint8_t* p) {
  std::int32_t cell;
  __builtin_memcpy(&cell, p, sizeof cell);
  return broadcast_cell(cell);
}
// Copies one cell of each quarter to all cells of that quarter.
template <int Cell>
inline Bytes repeat_cell(Bytes a) {
  return {_mm512_shuffle_epi32(a.r, static_cast<_MM_PERM_ENUM>(Cell * 0x55))};
}

// Transposes two cells of each quarter of four rows. In each quarter of cells[c], cell r is cell 2 * Half + c of the
// same quarter of rows[r].
template <int Half>
inline void transpose_cells(const Bytes (&rows)[4], Bytes (&cells)[2]) {
  const auto pairs = [](Bytes a, Bytes b) {
    return Half == 0 ? _mm512_unpacklo_epi32(a.r, b.r) : _mm512_unpackhi_epi32(a.r, b.r);
  };
  const __m512i first = pairs(rows[0], rows[1]), second = pairs(rows[2], rows[3]);
  cells[0].r = _mm512_unpacklo_epi64(first, second);
  cells[1].r = _mm512_unpackhi_epi64(first, second);
}

// Transposes eight bytes of each quarter of four rows. In each quarter of cells[c], cell i has one byte of each row:
// byte 8 * Half + 4 * c + i of the same quarter.
template <int Half>
inline void transpose_bytes(const Bytes (&rows)[4], Bytes (&cells)[2]) {
  const auto pairs = [](Bytes a, Bytes b) {
    return Half == 0 ? _mm512_unpacklo_epi8(a.r, b.r) : _mm512_unpackhi_epi8(a.r, b.r);
  };
  const __m512i first = pairs(rows[0], rows[1]), second = pairs(rows[2], rows[3]);
  cells[0].r = _mm512_unpacklo_epi16(first, second);
  cells[1].r = _mm512_unpackhi_epi16(first, second);
}

inline Integers load_integers(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Integers operator+(Integers a, Integers b) { return {_mm512_add_epi32(a.r, b.r)}; }
// Rounds to the nearest integer.
inline Integers to_integers(VecF a) { return {_mm512_cvtps_epi32(a.r)}; }
inline VecF to_floats(Integers a) { return {_mm512_cvtepi32_ps(a.r)}; }
// x = significand(x) * 2^exponent(x), with a significand from 1 to 2 or from -2 to -1. For x = 0: 1 and -infinity.
inline VecF significand(VecF a) { return {_mm512_getmant_ps(a.r, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)}; }
inline VecF exponent(VecF a) { return {_mm512_getexp_ps(a.r)}; }
// The lowest byte of each integer, as a signed number.
inline Integers lowest_bytes(Integers a) { return {_mm512_srai_epi32(_mm512_slli_epi32(a.r, 24), 24)}; }
inline Integers divided_by_256(Integers a) { return {_mm512_srai_epi32(a.r, 8)}; }  // rounded down
inline Integers broadcast(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline std::int32_t reduce_sum(Integers a) { return _mm512_reduce_add_epi32(a.r); }
// Stores the lowest byte of each integer.
inline void store_lowest_bytes(void* p, Integers a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.r));
}
// Stores a vector with x in all cells of the first quarter and 0 in the other quarters.
inline void store_in_first_quarter(void* p, std::int32_t x) { _mm512_storeu_si512(p, _mm512_maskz_set1_epi32(0xf, x)); }

// sum + the dot product of four unsigned bytes and four signed bytes, per cell. Inline assembly, because GCC spills
// sums if it sees the intrinsic.
inline Integers add_products(Bytes of_unsigned, Bytes of_signed, Integers sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.r) : "v"(of_unsigned.r), "v"(of_signed.r));
  return sum;
}

// Adds up the four quarters of each vector. The quarters of the result are the sums of a, b, c and d, in this order.
inline Integers reduce_quarters(Integers a, Integers b, Integers c, Integers d) {
  const auto halve = [](__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  };
  return {halve(halve(a.r, b.r), halve(c.r, d.r))};
}

}  // namespace selfattn::SELFATTN_ISA
