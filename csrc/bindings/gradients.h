// Helpers for the functions that compute gradients: checks of their operands, and arrays for their results.
#pragma once
#include "backward.h"
#include "bindings/arrays.h"

namespace selfattn::bindings {

// The view of an operand of the backward pass, which must have the shape of one of the forward pass's results.
TensorView shaped_view(const char* function, const char* name, py::handle array, const Shape& shape);

// Like shaped_view, for an array with q's dtype or the type of computation.
TensorView result_view(const char* function, const char* name, py::handle array, const Shape& shape, DType query);

// The log-sum-exp that the forward pass returned.
TensorView lse_view(const char* function, py::handle array, const Shape& shape);

py::array zeros(const Shape& shape, DType dtype);

// Allocates the gradient of a bias. If the bias has one key, the core sums over keys. Otherwise, if the bias has one
// query, the core sums over queries. In both cases the caller sums over the other axes along which the bias is
// broadcast. If the bias has several keys and several queries, the core computes all sums, in the shape of the bias: an
// array with every query, key and head would be too large.
py::array bias_gradient(Problem& problem, const TensorView& bias, Gradients& gradients);

}  // namespace selfattn::bindings
