// What the core knows of an array: where it is and how to walk it. Owns nothing.
#pragma once
#include <cstddef>
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

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = -1;  // -1: the argument is absent; 0 is a scalar, whose shape may be null
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;  // bytes

  explicit operator bool() const { return ndim >= 0; }
  // Counted from the end: axis 0 is the last one.
  std::int64_t extent(int from_end) const { return shape[ndim - 1 - from_end]; }
  std::int64_t stride(int from_end) const { return strides[ndim - 1 - from_end]; }
};

}  // namespace selfattn
