// Element types, and the type in which each is computed.
#pragma once
#include <cstdint>

namespace selfattn {

// i8: codes of a quantised cache, with one scale per row.
enum class DType : std::uint8_t { f32, f64, f16, bf16, i8, i64, boolean };

// 16-bit types: only loaded and stored; computed as f32.
constexpr bool is_narrow(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }
constexpr std::int64_t narrow_size = 2;

constexpr DType computed_in(DType dtype) { return is_narrow(dtype) || dtype == DType::i8 ? DType::f32 : dtype; }

constexpr std::int64_t size_of(DType dtype) {
  if (dtype == DType::boolean || dtype == DType::i8) return 1;
  return is_narrow(dtype) ? narrow_size : dtype == DType::f32 ? 4 : 8;
}

}  // namespace selfattn
