// Element types, and the type that each is computed in.
#pragma once
#include <cstdint>

namespace selfattn {

enum class DType : std::uint8_t { f32, f64, f16, bf16, i64, boolean };

// 16 bits: read and written, but computed with as f32.
constexpr bool is_narrow(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }
constexpr std::int64_t narrow_size = 2;

constexpr DType computed_in(DType dtype) { return is_narrow(dtype) ? DType::f32 : dtype; }

constexpr std::int64_t size_of(DType dtype) {
  return dtype == DType::boolean ? 1 : is_narrow(dtype) ? narrow_size : dtype == DType::f32 ? 4 : 8;
}

}  // namespace selfattn
