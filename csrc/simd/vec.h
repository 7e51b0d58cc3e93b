// The vector types and operations of the ISA that this translation unit is compiled for.
#pragma once
#ifndef SELFATTN_ISA
#define SELFATTN_ISA portable  // lets editors and analysers parse a kernel header by itself
#define SELFATTN_VEC "simd/vec_portable.h"
#endif
#include SELFATTN_VEC

namespace selfattn::SELFATTN_ISA {

// Partial loads and stores of narrow types go through a buffer. This is fast enough, because only the ends of rows need
// them. The loops also check the size of the buffer, because the compiler does not know that n is smaller.
template <class E>
inline VecF load_partial_narrow(const E* p, int n) {
  E buffer[VecF::width] = {};
  for (int i = 0; i < VecF::width && i < n; ++i) std::memcpy(buffer + i, p + i, sizeof(E));
  return load(static_cast<const E*>(buffer));
}
inline VecF load_partial(const BFloat* p, int n) { return load_partial_narrow(p, n); }
inline VecF load_partial(const Half* p, int n) { return load_partial_narrow(p, n); }
inline VecF load_partial(const Int8* p, int n) { return load_partial_narrow(p, n); }

// Loads adjacent numbers in the order that is fastest; put_in_order restores the order of memory.
template <class E, class V, int N>
inline void load_adjacent(const E* p, V (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] = load(p + i * V::width);
}
template <class V, int N, class E>
inline void put_in_order(V (&)[N], E) {}

template <class E>
inline void store_partial_narrow(E* p, VecF a, int n) {
  E buffer[VecF::width];
  store(static_cast<E*>(buffer), a);
  for (int i = 0; i < VecF::width && i < n; ++i) std::memcpy(p + i, buffer + i, sizeof(E));
}
inline void store_partial(BFloat* p, VecF a, int n) { store_partial_narrow(p, a, n); }
inline void store_partial(Half* p, VecF a, int n) { store_partial_narrow(p, a, n); }

}  // namespace selfattn::SELFATTN_ISA
