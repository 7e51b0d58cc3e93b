// Element types, in one table: sizes, codes and conversions. Each kernel set has a table of the kernels for these
// types: TypeKernels::stored.
#pragma once
#include <cstdint>

#include "arithmetic.h"

namespace selfattn {

// i8, i4: codes of a quantised cache; i8 also of quantised weights. First come the types that keys and values may have.
enum class DType : std::uint8_t { f32, f64, f16, bf16, i8, i4, i64, boolean };

// Converts the elements of one word to numbers (of codes: without the scale), and back.
using ReadWord = void(const char* word, double* numbers);
using WriteWord = void(char* word, const double* numbers);
// Rounds a row to codes and returns the row's scale: a number is about code * scale. A number that is not finite makes
// the whole row NaN.
using QuantiseRow = float(const float* row, std::int64_t count, char* words);

// The conversions of each type (dtype.cpp). Kernels have faster conversions of whole rows.
ReadWord read_f32, read_f64, read_f16, read_bf16, read_i8, read_i4;
WriteWord write_f32, write_f64, write_f16, write_bf16;
QuantiseRow quantise_i8, quantise_i4;

// Rows are stored in words of whole bytes. Elements of less than a byte share a word. Any other element is a word.
struct ElementType {
  const char* name;       // in NumPy
  const char* memory;     // NumPy's type for a word; NumPy has no bfloat16
  std::int64_t elements;  // of a word
  std::int64_t bytes;     // of a word
  DType computed;         // the type in which its numbers are computed
  DType unpacked;         // the type of the same elements, one per word: kernels read no other words
  int codes = 0;          // elements are codes up to +-codes, and a number is code * scale; 0: elements are numbers
  ReadWord* read = nullptr;
  WriteWord* write = nullptr;       // null for codes
  QuantiseRow* quantise = nullptr;  // null for numbers
};

// By DType.
constexpr ElementType element_types[] = {
    {"float32", "float32", 1, 4, DType::f32, DType::f32, 0, read_f32, write_f32},
    {"float64", "float64", 1, 8, DType::f64, DType::f64, 0, read_f64, write_f64},
    {"float16", "float16", 1, 2, DType::f32, DType::f16, 0, read_f16, write_f16},
    {"bfloat16", "uint16", 1, 2, DType::f32, DType::bf16, 0, read_bf16, write_bf16},
    {"int8", "int8", 1, 1, DType::f32, DType::i8, 127, read_i8, nullptr, quantise_i8},
    {"int4", "V17", 32, 17, DType::f32, DType::i8, 120, read_i4, nullptr, quantise_i4},
    {"int64", "int64", 1, 8, DType::i64, DType::i64},
    {"bool", "bool", 1, 1, DType::boolean, DType::boolean},
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
// Bytes of a word, which is an element unless elements share words: the distance from one word to the next in a
// contiguous row.
constexpr std::int64_t size_of(DType dtype) { return element_type(dtype).bytes; }
constexpr bool shares_words(DType dtype) { return element_type(dtype).elements > 1; }
constexpr std::int64_t words_of(DType dtype, std::int64_t count) {
  return ceil_div(count, element_type(dtype).elements);
}
constexpr std::int64_t row_bytes(DType dtype, std::int64_t count) { return words_of(dtype, count) * size_of(dtype); }
// Kernels need addresses and distances that are multiples of this. A word with several elements is a string of bytes.
constexpr std::int64_t alignment_of(DType dtype) { return shares_words(dtype) ? 1 : size_of(dtype); }
constexpr DType computed_in(DType dtype) { return element_type(dtype).computed; }
constexpr DType unpacked_type(DType dtype) { return element_type(dtype).unpacked; }
constexpr bool is_scaled(DType dtype) { return element_type(dtype).codes != 0; }

// Whether numbers of type `a` take less memory than numbers of type `b`.
constexpr bool takes_less(DType a, DType b) {
  return size_of(a) * element_type(b).elements < size_of(b) * element_type(a).elements;
}

// The 16-bit types. Numbers are stored in them but computed in float32. Results can be rounded to them.
constexpr bool is_narrow(DType dtype) { return computed_in(dtype) != dtype && !is_scaled(dtype); }
constexpr std::int64_t narrow_size = 2;

// The most elements of a word.
constexpr std::int64_t most_elements = 32;
static_assert([] {
  for (const ElementType& type : element_types)
    if (type.elements > most_elements) return false;
  return true;
}());

// The number of types that keys and values may have.
constexpr int stored_count = static_cast<int>(DType::i64);

constexpr double largest_number(DType computed) { return computed == DType::f32 ? double{__FLT_MAX__} : __DBL_MAX__; }

// Calls the template `use` for the C++ type of a type of computation.
template <class Use>
constexpr auto with_type(DType computed, Use use) {
  return computed == DType::f32 ? use.template operator()<float>() : use.template operator()<double>();
}

}  // namespace selfattn
