// Converts rows of any type and strides to contiguous rows of the type of computation, and back.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/kernel_set.h"
#include "tensor_view.h"

namespace selfattn {

// For types that do not share words.
double read_real(const char* p, DType dtype);
void write_real(char* p, double x, DType dtype);

// Where rows of elements are; strides in bytes.
template <class Byte>
struct StridedRows {
  Byte* data;
  std::int64_t row, column;
};

struct SourceRows : StridedRows<const char> {
  DType dtype;
};

struct TargetRow {
  char* data;
  std::int64_t column;
  DType dtype;
};

// Copies `rows` rows of `count` elements of `size` bytes.
void copy_rows(const StridedRows<char>& to, const StridedRows<const char>& from, std::int64_t rows, std::int64_t count,
               std::int64_t size);

// Converts rows to contiguous rows of `to_type`. The target type is at least as wide as the source type, except that
// floats may be rounded to a 16-bit type. Elements that share words are converted to the type of computation or to the
// unpacked type.
void gather_rows(const KernelSet& kernels, char* to, DType to_type, const SourceRows& from, std::int64_t rows,
                 std::int64_t count);

// Adds contiguous doubles, which may be misaligned, to a row.
template <class T>
void add_doubles(T* row, const char* added, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    double x;
    std::memcpy(&x, added + i * size_of(DType::f64), sizeof x);
    row[i] += static_cast<T>(x);
  }
}

// Multiplies a contiguous row of floats or doubles by `factor`.
void scale_row(char* row, DType dtype, std::int64_t count, double factor);

// Writes a contiguous row to elements of the same type, or rounds it to a narrower type.
void scatter_row(const KernelSet& kernels, const TargetRow& to, const char* from, DType from_type, std::int64_t count);

}  // namespace selfattn
