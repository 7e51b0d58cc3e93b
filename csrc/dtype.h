// Element types, in one table. Each kernel set has a table of their kernels: TypeKernels::stored.
#pragma once
#include <cstdint>

namespace selfattn {

// i8: codes of a quantised cache or of quantised weights.
enum class DType : std::uint8_t { f32, f64, f16, bf16, i8, i64, boolean };

struct ElementType {
  const char* name;     // in NumPy
  std::int64_t size;    // bytes
  DType computed;       // the type in which its numbers are computed
  bool scaled = false;  // elements are codes: a number is code * scale
};

// By DType.
constexpr ElementType element_types[] = {
    {"float32", 4, DType::f32},     // f32
    {"float64", 8, DType::f64},     // f64
    {"float16", 2, DType::f32},     // f16
    {"bfloat16", 2, DType::f32},    // bf16
    {"int8", 1, DType::f32, true},  // i8
    {"int64", 8, DType::i64},       // i64
    {"bool", 1, DType::boolean},    // boolean
};
constexpr int dtype_count = sizeof(element_types) / sizeof(element_types[0]);
static_assert(dtype_count == static_cast<int>(DType::boolean) + 1);

constexpr const ElementType& element_type(DType dtype) { return element_types[static_cast<int>(dtype)]; }
constexpr const char* name_of(DType dtype) { return element_type(dtype).name; }
constexpr std::int64_t size_of(DType dtype) { return element_type(dtype).size; }
constexpr DType computed_in(DType dtype) { return element_type(dtype).computed; }
constexpr bool is_scaled(DType dtype) { return element_type(dtype).scaled; }

// The 16-bit types. Numbers are stored in them but computed in float32. Results can be rounded to them.
constexpr bool is_narrow(DType dtype) { return computed_in(dtype) != dtype && !is_scaled(dtype); }
constexpr std::int64_t narrow_size = 2;

}  // namespace selfattn
