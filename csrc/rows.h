// Rows of numbers in memory of any type and strides, and contiguous rows in the type of computation.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"
#include "tensor_view.h"

namespace selfattn {

// Keeps a finite number in [-most, most].
double clamp_finite(double x, double most);

double read_real(const char* p, DType dtype);
void write_real(char* p, double x, DType dtype);

// Copies `rows` rows of `count` elements of `size` bytes between any two strides.
void copy_rows(char* to, std::int64_t to_row, std::int64_t to_column, const char* from, std::int64_t from_row,
               std::int64_t from_column, std::int64_t rows, std::int64_t count, std::int64_t size);

// Brings rows of any type, `from_row` and `from_column` bytes apart, to contiguous rows of another that holds them all.
void gather_rows(const KernelSet& kernels, char* to, DType to_type, const char* from, DType from_type,
                 std::int64_t from_row, std::int64_t from_column, std::int64_t rows, std::int64_t count);

// Multiplies a contiguous row of floats or doubles.
void scale_row(char* row, DType dtype, std::int64_t count, double factor);

// Brings a contiguous row to elements of its own type, or rounds it to one of 16 bits, `to_column` bytes apart.
void scatter_row(const KernelSet& kernels, char* to, DType to_type, std::int64_t to_column, const char* from,
                 DType from_type, std::int64_t count);

}  // namespace selfattn
