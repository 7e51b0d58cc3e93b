// What the functions that compute gradients share: checks of their operands, and arrays for their results.
#pragma once
#include "backward.h"
#include "bindings/arrays.h"

namespace selfattn::bindings {

// An operand of the backward pass that has a shape of the forward pass's results.
TensorView shaped_view(const char* function, const char* name, py::handle array, const Shape& shape);

// The same with q's dtype or the type of computation.
TensorView result_view(const char* function, const char* name, py::handle array, const Shape& shape, DType query);

// The log-sum-exp that the forward pass returned.
TensorView lse_view(const char* function, py::handle array, const Shape& shape);

py::array zeros(const Shape& shape, DType dtype);

// Allocates the gradient of a bias. What the bias does not tell apart is summed as it is computed; axes of heads and
// batch are left to the caller, unless that would take an array larger than the bias for every pair of query and key.
py::array bias_gradient(Problem& problem, const TensorView& bias, Gradients& gradients);

}  // namespace selfattn::bindings
