// Any CPU: 16-byte vectors with the compiler's vector extensions (SSE2 on x86-64, the baseline elsewhere). Every
// vec_*.h offers these operations.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd/narrow.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
struct Vec {
  static constexpr int width = 16 / static_cast<int>(sizeof(T));
  typedef T Register __attribute__((vector_size(16)));
  Register r;
};

// In each lane, either all bits are set or none.
template <class T>
struct Mask {
  decltype(typename Vec<T>::Register{} < typename Vec<T>::Register{}) r;
};

using VecF = Vec<float>;
using VecD = Vec<double>;

// Construction, loads and stores. Partial loads and stores access only the first n lanes (n < width). A partial load
// sets the other lanes to 0.
template <class T>
inline Vec<T> broadcast(T x) {
  return {x - typename Vec<T>::Register{}};  // subtracting 0 keeps the sign of a zero
}
template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v.r, p, sizeof v.r);
  return v;
}
template <class T>
inline Vec<T> load_partial(const T* p, int n) {
  Vec<T> v{};
  for (int i = 0; i < n; ++i) v.r[i] = element_at(p + i);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> a) {
  std::memcpy(p, &a.r, sizeof a.r);
}
template <class T>
inline void store_partial(T* p, Vec<T> a, int n) {
  for (int i = 0; i < n; ++i) {
    const T element = a.r[i];
    std::memcpy(p + i, &element, sizeof element);
  }
}
// Loads and stores of 16-bit numbers. Stores round to nearest, ties to even. 8-bit codes are only loaded.
inline VecF load(const BFloat* p) {
  VecF v{};
  for (int i = 0; i < VecF::width; ++i) v.r[i] = widen(element_at(p + i));
  return v;
}
inline VecF load(const Half* p) {
  VecF v{};
  for (int i = 0; i < VecF::width; ++i) v.r[i] = widen(element_at(p + i));
  return v;
}
inline VecF load(const Int8* p) {
  VecF v{};
  for (int i = 0; i < VecF::width; ++i) v.r[i] = widen(p[i]);
  return v;
}
inline void store(BFloat* p, VecF a) {
  for (int i = 0; i < VecF::width; ++i) {
    const BFloat element = to_bfloat(a.r[i]);
    std::memcpy(p + i, &element, sizeof element);
  }
}
inline void store(Half* p, VecF a) {
  for (int i = 0; i < VecF::width; ++i) {
    const Half element = to_half(a.r[i]);
    std::memcpy(p + i, &element, sizeof element);
  }
}
// Makes the compiler load a value into a register once. Nothing to do here: SSE2 arithmetic cannot read unaligned
// memory, so such loads are separate instructions anyway.
template <class T>
inline Vec<T> in_register(Vec<T> a) {
  return a;
}
// Loads two vectors of bfloat16; here in the order of memory.
inline void load_adjacent(const BFloat* p, VecF (&x)[2]) {
  x[0] = load(p);
  x[1] = load(p + VecF::width);
}
inline void put_in_order(VecF (&)[2], BFloat) {}
// 0, 1, 2, ...
template <class T>
inline Vec<T> iota(T) {
  Vec<T> v{};
  for (int i = 0; i < Vec<T>::width; ++i) v.r[i] = static_cast<T>(i);
  return v;
}

// where ? a : b
template <class T>
inline Vec<T> select(Mask<T> where, Vec<T> a, Vec<T> b) {
  return {where.r ? a.r : b.r};
}

// Arithmetic. max and min return b if either operand is NaN.
template <class T>
inline Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.r + b.r};
}
template <class T>
inline Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.r - b.r};
}
template <class T>
inline Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.r * b.r};
}
template <class T>
inline Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.r / b.r};
}
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.r * b.r + c.r};
}
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.r > b.r ? a.r : b.r};
}
template <class T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  return {a.r < b.r ? a.r : b.r};
}
template <class T>
inline Vec<T> abs(Vec<T> a) {
  return {a.r < 0 ? -a.r : a.r};
}
template <class T>
inline Vec<T> copy_sign(Vec<T> size, Vec<T> sign) {
  return {sign.r < 0 ? -abs(size).r : abs(size).r};
}

// All comparisons except is_nan are false in lanes where an operand is NaN.
template <class T>
inline Mask<T> operator<(Vec<T> a, Vec<T> b) {
  return {a.r < b.r};
}
template <class T>
inline Mask<T> operator<=(Vec<T> a, Vec<T> b) {
  return {a.r <= b.r};
}
template <class T>
inline Mask<T> operator==(Vec<T> a, Vec<T> b) {
  return {a.r == b.r};
}
template <class T>
inline Mask<T> is_nan(Vec<T> a) {
  return {a.r != a.r};
}
template <class T>
inline Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.r & b.r};
}
template <class T>
inline Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {a.r | b.r};
}
template <class T>
inline bool any(Mask<T> a) {
  std::uint64_t halves[2];
  std::memcpy(halves, &a.r, sizeof halves);
  return (halves[0] | halves[1]) != 0;
}
template <class T>
inline bool all(Mask<T> a) {
  std::uint64_t halves[2];
  std::memcpy(halves, &a.r, sizeof halves);
  return (halves[0] & halves[1]) == ~std::uint64_t{0};
}

// Steps of exp2. round() rounds to the nearest integer if |a| < 2^22 (double: 2^51). scale_by_power() returns x * 2^n
// for an integral n. If x is finite and n <= -127 (double: -1023), the result is exactly 0.
template <class T>
inline Vec<T> round(Vec<T> a) {
  // 1.5 * 2^23 (double: 1.5 * 2^52). Adding it rounds a to an integer.
  const T magic = sizeof(T) == 4 ? static_cast<T>(12582912.0) : static_cast<T>(6755399441055744.0);
  return {(a.r + magic) - magic};
}
inline VecF scale_by_power(VecF x, VecF n) {
  VecF v;
  for (int i = 0; i < VecF::width; ++i) {
    const float limited = n.r[i] > -127.0f ? (n.r[i] < 128.0f ? n.r[i] : 128.0f) : -127.0f;
    const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(limited) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    v.r[i] = x.r[i] * power;
  }
  return v;
}
inline VecD scale_by_power(VecD x, VecD n) {
  VecD v;
  for (int i = 0; i < VecD::width; ++i) {
    const double limited = n.r[i] > -1023.0 ? (n.r[i] < 1024.0 ? n.r[i] : 1024.0) : -1023.0;
    const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<std::int64_t>(limited) + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof power);
    v.r[i] = x.r[i] * power;
  }
  return v;
}

// Reductions over lanes, in a fixed order.
template <class T>
inline T reduce_max(Vec<T> a) {
  T m = a.r[0];
  for (int i = 1; i < Vec<T>::width; ++i) m = m > a.r[i] ? m : a.r[i];
  return m;
}
template <class T>
inline T reduce_sum(Vec<T> a) {
  T s = a.r[0];
  for (int i = 1; i < Vec<T>::width; ++i) s += a.r[i];
  return s;
}

// Lane i of the result is the sum of the lanes of v[i].
template <class T, int N>
inline Vec<T> reduce_sums(const Vec<T> (&v)[N]) {
  static_assert(N == Vec<T>::width);
  Vec<T> sums;
  for (int i = 0; i < N; ++i) sums.r[i] = reduce_sum(v[i]);
  return sums;
}

// Loads bytes of a boolean array: 0 where the byte is nonzero (visible), -inf where it is zero (hidden).
template <class T>
inline Vec<T> load_hidden(const std::uint8_t* p, T) {
  Vec<T> v{};
  for (int i = 0; i < Vec<T>::width; ++i) v.r[i] = p[i] != 0 ? T(0) : -static_cast<T>(__builtin_inf());
  return v;
}

template <class T>
inline Vec<T> reverse(Vec<T> a) {
  Vec<T> v;
  for (int i = 0; i < Vec<T>::width; ++i) v.r[i] = a.r[Vec<T>::width - 1 - i];
  return v;
}

// Transposes a square matrix; each vector is a row.
template <class T, int N>
inline void transpose(Vec<T> (&v)[N]) {
  static_assert(N == Vec<T>::width);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < i; ++j) {
      const T held = v[i].r[j];
      v[i].r[j] = v[j].r[i];
      v[j].r[i] = held;
    }
}

// 32-bit words in the lower halves of 64-bit lanes. All operations except upper_half ignore the upper halves.
struct Words {
  static constexpr int width = 2;
  typedef std::uint64_t Register __attribute__((vector_size(16)));
  Register r;
};
inline Words broadcast_word(std::uint32_t x) { return {Words::Register{x, x}}; }
inline Words load_words(const std::uint32_t* p) { return {Words::Register{p[0], p[1]}}; }
inline void store_words(std::uint32_t* p, Words a) {
  for (int i = 0; i < Words::width; ++i) p[i] = static_cast<std::uint32_t>(a.r[i]);
}
inline Words operator^(Words a, Words b) { return {a.r ^ b.r}; }
// multiply gives 64-bit products. The lower half of a product is a word already; upper_half moves the upper half there.
inline Words multiply(Words a, Words b) { return {(a.r & 0xffffffff) * (b.r & 0xffffffff)}; }
inline Words upper_half(Words a) { return {a.r >> 32}; }
// Whether each word is at least `limit`.
inline Mask<float> at_least(const Words (&a)[2], std::uint32_t limit) {
  Mask<float> mask;
  for (int i = 0; i < VecF::width; ++i) mask.r[i] = static_cast<std::uint32_t>(a[i / 2].r[i % 2]) >= limit ? -1 : 0;
  return mask;
}
inline Mask<double> at_least(const Words (&a)[1], std::uint32_t limit) {
  return {(a[0].r & 0xffffffff) >= Words::Register{limit, limit}};
}

}  // namespace selfattn::SELFATTN_ISA
