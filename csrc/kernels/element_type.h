// Maps the element types of this ISA to DType.
#pragma once
#include "dtype.h"
#include "simd/narrow.h"

namespace selfattn::SELFATTN_ISA {

constexpr DType dtype_of(float) { return DType::f32; }
constexpr DType dtype_of(double) { return DType::f64; }
constexpr DType dtype_of(Half) { return DType::f16; }
constexpr DType dtype_of(BFloat) { return DType::bf16; }
constexpr DType dtype_of(Int8) { return DType::i8; }
constexpr DType dtype_of(Int4) { return DType::i4; }

// Whether each row of this type has its own scale.
template <class E>
constexpr bool scaled = is_scaled(dtype_of(E()));

// Whether kernels of products read the type from memory. They step one element at a time.
template <class E>
constexpr bool steps_elements = !shares_words(dtype_of(E()));

// Calls `use` with a value of the C++ type that corresponds to `type`, the type of the outputs. T: the type of
// computation.
template <class T, class Use>
inline void use_out_type(DType type, Use use) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == DType::bf16) return use(BFloat());
    if (type == DType::f16) return use(Half());
  }
  use(T());
}

}  // namespace selfattn::SELFATTN_ISA
