#include "bindings/gradients.h"

#include <algorithm>

#include "message.h"

namespace selfattn::bindings {

TensorView shaped_view(const char* function, const char* name, py::handle array, const Shape& shape) {
  const TensorView view = float_view(function, name, array);
  if (view.ndim != shape.ndim || !std::equal(shape.extent, shape.extent + shape.ndim, view.shape))
    refuse(function, Argument{name}, " has shape ", shape_text(view), " but ", to_text(shape.extent, shape.ndim),
           " is needed");
  return view;
}

TensorView result_view(const char* function, const char* name, py::handle array, const Shape& shape, DType query) {
  const TensorView view = shaped_view(function, name, array, shape);
  if (view.dtype != query && view.dtype != computed_in(query))
    refuse<TypeRefusal>(function, Argument{name}, " has dtype ", name_of(view.dtype), ", but ", name_of(query),
                        query == computed_in(query) ? "" : " or float32", " is needed");
  return view;
}

TensorView lse_view(const char* function, py::handle array, const Shape& shape) {
  const TensorView view = shaped_view(function, "lse", array, shape);
  if (view.dtype != computed_in(view.dtype))
    refuse<TypeRefusal>(function, "lse"_arg, " has dtype ", name_of(view.dtype), ", but float32 or float64 is needed");
  return view;
}

py::array zeros(const Shape& shape, DType dtype) {
  py::tuple extents(static_cast<std::size_t>(shape.ndim));
  for (int axis = 0; axis < shape.ndim; ++axis) extents[static_cast<std::size_t>(axis)] = shape.extent[axis];
  return py::module_::import("numpy").attr("zeros")(extents, name_of(dtype));
}

py::array bias_gradient(Problem& problem, const TensorView& bias, Gradients& gradients) {
  const bool one_key = bias.ndim < 1 || bias.extent(0) == 1, one_query = bias.ndim < 2 || bias.extent(1) == 1;
  Shape shape = lse_shape(problem);
  if (one_key && problem.kv_len != 1) {
    shape.append(1);
    const py::array array = zeros(shape, DType::f64);
    gradients.row_sums = static_cast<double*>(const_cast<void*>(array.data()));
    return array;
  }
  if (one_query && problem.q_len != 1) {
    shape.extent[shape.ndim - 1] = 1;
    shape.append(problem.kv_len);
    const py::array array = zeros(shape, problem.dtype);
    gradients.key_sums = static_cast<char*>(const_cast<void*>(array.data()));
    return array;
  }
  py::array array = zeros(shape_of(bias), problem.dtype);
  gradients.scores = place_scores(problem, view_of(array, problem.dtype));
  gradients.shares_scores = array.size() != problem.batch * problem.num_heads * problem.q_len * problem.kv_len;
  return array;
}

}  // namespace selfattn::bindings
