// What drivers call a type of this ISA's.
#pragma once
#include "dtype.h"
#include "simd/narrow.h"

namespace selfattn::SELFATTN_ISA {

constexpr DType dtype_of(float) { return DType::f32; }
constexpr DType dtype_of(double) { return DType::f64; }
constexpr DType dtype_of(Half) { return DType::f16; }
constexpr DType dtype_of(BFloat) { return DType::bf16; }

}  // namespace selfattn::SELFATTN_ISA
