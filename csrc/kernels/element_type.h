// What drivers call a type of this ISA's.
#pragma once
#include "dtype.h"
#include "simd/narrow.h"

namespace selfattn::SELFATTN_ISA {

constexpr DType dtype_of(float) { return DType::f32; }
constexpr DType dtype_of(double) { return DType::f64; }
constexpr DType dtype_of(Half) { return DType::f16; }
constexpr DType dtype_of(BFloat) { return DType::bf16; }

constexpr DType dtype_of(Int8) { return DType::i8; }

// Whether a row of such numbers has a scale of its own.
template <class E>
constexpr bool scaled = false;
template <>
inline constexpr bool scaled<Int8> = true;

// Calls use with a number of the type that a block's outputs have; T is that of the computation.
template <class T, class Use>
inline void use_out_type(DType type, Use use) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == DType::bf16) return use(BFloat());
    if (type == DType::f16) return use(Half());
  }
  use(T());
}

}  // namespace selfattn::SELFATTN_ISA
