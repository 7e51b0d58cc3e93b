// Element types, in one table. Each kernel set has a table of the kernels for these types: TypeKernels::stored.
#pragma once
#include <cstdint>

namespace selfattn {

// i8: codes of a quantised cache or of quantised weights.
enum class DType : std::uint8_t { f32, f64, f16, bf16, i8, i64, boolean };

// Rows are stored in units of whole bytes. Elements of less than a byte share a unit. Any other element is a unit.
struct ElementType {
  const char* name;       // in NumPy
  const char* memory;     // NumPy's type for memory with these elements; NumPy has no bfloat16
  std::int64_t elements;  // of a unit
  std::int64_t bytes;     // of a unit
  DType computed;         // the type in which its numbers are computed
  int codes = 0;          // elements are codes up to +-codes, and a number is code * scale; 0: elements are numbers
};

// By DType.
constexpr ElementType element_types[] = {
    {"float32", "float32", 1, 4, DType::f32},  // f32
    {"float64", "float64", 1, 8, DType::f64},  // f64
    {"float16", "float16", 1, 2, DType::f32},  // f16
    {"bfloat16", "uint16", 1, 2, DType::f32},  // bf16
    {"int8", "int8", 1, 1, DType::f32, 127},   // i8
    {"int64", "int64", 1, 8, DType::i64},      // i64
    {"bool", "bool", 1, 1, DType::boolean},    // boolean
};
constexpr int dtype_count = sizeof(element_types) / sizeof(element_types[0]);
static_assert(dtype_count == static_cast<int>(DType::boolean) + 1);

// One item for each type.
template <class T>
struct ByType {
  T items[dtype_count];

  constexpr T& operator[](DType dtype) { return items[static_cast<int>(dtype)]; }
  constexpr const T& operator[](DType dtype) const { return items[static_cast<int>(dtype)]; }
};

constexpr const ElementType& element_type(DType dtype) { return element_types[static_cast<int>(dtype)]; }
constexpr const char* name_of(DType dtype) { return element_type(dtype).name; }
// Bytes of an element, or of a unit if elements share units: the distance from one to the next in a contiguous row.
constexpr std::int64_t size_of(DType dtype) { return element_type(dtype).bytes; }
constexpr std::int64_t row_bytes(DType dtype, std::int64_t count) {
  const std::int64_t elements = element_type(dtype).elements;
  return (count + elements - 1) / elements * size_of(dtype);
}
constexpr DType computed_in(DType dtype) { return element_type(dtype).computed; }
constexpr bool is_scaled(DType dtype) { return element_type(dtype).codes != 0; }

// Whether numbers of type `a` take less memory than numbers of type `b`.
constexpr bool takes_less(DType a, DType b) {
  return size_of(a) * element_type(b).elements < size_of(b) * element_type(a).elements;
}

// The 16-bit types. Numbers are stored in them but computed in float32. Results can be rounded to them.
constexpr bool is_narrow(DType dtype) { return computed_in(dtype) != dtype && !is_scaled(dtype); }
constexpr std::int64_t narrow_size = 2;

constexpr double largest_number(DType computed) { return computed == DType::f32 ? double{__FLT_MAX__} : __DBL_MAX__; }

// Calls the template `use` for the C++ type of a type of computation.
template <class Use>
constexpr auto with_type(DType computed, Use use) {
  return computed == DType::f32 ? use.template operator()<float>() : use.template operator()<double>();
}

}  // namespace selfattn
