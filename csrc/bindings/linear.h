// Layers and norms as Python holds them.
#pragma once
#include "bindings/arrays.h"
#include "feed_forward.h"

namespace selfattn::bindings {

// The Python layer has converted the vectors to contiguous arrays of the type of computation, or they are None.
struct HeldNorm {
  static constexpr const char* capsule_name = "selfattn.Norm";

  HeldNorm(py::object weight, py::object bias, double epsilon, bool centred);

  const py::object weight, bias;
  const Norm norm;

 private:
  static const char* data_of(py::handle vector);
};

// The norm in a capsule, or null for None. Its vectors are as long as the rows.
const Norm* norm_or_none(py::handle capsule);

// Whether two arrays are the same memory in the same order.
bool same(const TensorView& a, const TensorView& b);

// What is added to a result of this type and shape; absent for None.
TensorView residual_view(const char* function, py::handle array, DType dtype, const Shape& shape);

// Writes the original weights to a matrix of the same type. Returns the bias as an array, or None.
py::object unpack(const Projection& projection, const TensorView& weights);

}  // namespace selfattn::bindings
