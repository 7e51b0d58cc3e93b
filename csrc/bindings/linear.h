// Norms that Python holds as capsules, and functions that the bindings of SelfAttention and of linear layers share.
#pragma once
#include "bindings/arrays.h"
#include "bindings/operands.h"
#include "feed_forward.h"

namespace selfattn::bindings {

// `weight` and `bias` are None, or contiguous arrays to which the Python layer has converted them, in the type of
// computation.
struct HeldNorm {
  static constexpr const char* capsule_name = "selfattn.Norm";

  explicit HeldNorm(const NormForm& form);

  const py::object weight, bias;
  const Norm norm;

 private:
  static const char* data_of(py::handle vector);
};

// The norm in a capsule, or null for None. The Python layer has checked that its vectors are as long as the rows.
const Norm* norm_or_none(py::handle capsule);

// Whether two views have the same memory, shape and strides.
bool same(const TensorView& a, const TensorView& b);

// The view of a residual, which must have the type and shape of the result; absent for None.
TensorView residual_view(const char* function, py::handle array, DType dtype, const Shape& shape);

// Writes the original weights to a matrix of the same type. Returns the bias as an array, or None.
py::object unpack(const Projection& projection, const TensorView& weights);

}  // namespace selfattn::bindings
