// Places arrays in a problem: converts their shapes and strides to the problem's form.
#pragma once
#include <initializer_list>

#include "problem.h"

namespace selfattn {

// The last three axes of q, k, v and out; a 2-D array has one head.
struct Axes {
  std::int64_t heads, head_stride, length, row_stride, dim, column_stride;
};
Axes trailing_axes(const TensorView& view, Layout layout);

// Number of axes before the last `trailing` ones.
int leading_axes(const TensorView& view, int trailing);

// Sets the operand's data, type and batch strides. The view's leading axes are right-aligned with the problem's batch
// axes.
void place_batch(Problem& problem, Operand& operand, const TensorView& view, int trailing);

// Sets all fields of the operand.
void place(Problem& problem, Operand& operand, const TensorView& view, const Axes& axes, std::int64_t page = 0);

// Whether rows with these strides are contiguous and aligned.
bool are_in_place(const void* data, DType dtype, std::int64_t column, std::initializer_list<std::int64_t> strides);

}  // namespace selfattn
