// attention_backward(): the gradients of attention.
#include "backward.h"

#include <algorithm>
#include <string>

#include "bindings/attention.h"
#include "message.h"
#include "registry.h"

namespace selfattn::bindings {
namespace {

// An operand of the backward pass that has a shape of the forward pass's results.
TensorView shaped_view(const char* function, const char* name, py::handle array, const Shape& shape) {
  const TensorView view = float_view(function, name, array);
  if (view.ndim != shape.ndim || !std::equal(shape.extent, shape.extent + shape.ndim, view.shape))
    refuse(function, name, " has shape ", shape_text(view), " but ", to_text(shape.extent, shape.ndim), " is needed");
  return view;
}

// The same with q's dtype or the type of computation.
TensorView result_view(const char* function, const char* name, py::handle array, const Shape& shape, DType query) {
  const TensorView view = shaped_view(function, name, array, shape);
  if (view.dtype != query && view.dtype != computed_in(query))
    throw py::type_error(std::string(function) + ": " + name + " has dtype " + name_of(view.dtype) + ", but " +
                         name_of(query) + (query == computed_in(query) ? "" : " or float32") + " is needed");
  return view;
}

TensorView lse_view(const char* function, py::handle array, const Shape& shape) {
  const TensorView view = shaped_view(function, "lse", array, shape);
  if (view.dtype != computed_in(view.dtype))
    throw py::type_error(std::string(function) + ": lse has dtype " + name_of(view.dtype) +
                         ", but float32 or float64 is needed");
  return view;
}

py::array zeros(const Shape& shape, DType dtype) {
  py::tuple extents(static_cast<std::size_t>(shape.ndim));
  for (int axis = 0; axis < shape.ndim; ++axis) extents[static_cast<std::size_t>(axis)] = shape.extent[axis];
  return py::module_::import("numpy").attr("zeros")(extents, name_of(dtype));
}

// Allocates the arrays of the gradients that are wanted.
class Results {
 public:
  Results(const Problem& problem, const AttentionArguments& arguments, const py::sequence& wrt)
      : problem_(problem), arguments_(arguments), wrt_(wrt) {}

  py::dict arrays;
  Gradients gradients;

  void allocate(const py::tuple& operands) {
    place("q", gradients.query, operands[1], problem_.num_heads, problem_.q_len, problem_.head_dim);
    place("k", gradients.key, operands[2], problem_.num_kv_heads, problem_.kv_len, problem_.head_dim);
    place("v", gradients.value, operands[3], problem_.num_kv_heads, problem_.kv_len, problem_.value_dim);
    if (wants("bias")) bias();
    const Shape rows = lse_shape(problem_);
    gradients.scale = doubles_for("scale", rows);
    gradients.slopes = doubles_for("alibi_slopes", rows);
    gradients.sinks = doubles_for("sinks", rows);
    Shape distances = rows;
    distances.extent[distances.ndim - 1] = problem_.distance_bias.count;
    gradients.distance_bias = doubles_for("t5", distances);
  }

 private:
  bool wants(const char* name) const { return wrt_.contains(name); }

  // In the operand's dtype if it has all axes, else in the type of computation: its caller has to sum over some.
  void place(const char* name, Operand& operand, py::handle like, std::int64_t heads, std::int64_t length,
             std::int64_t dim) {
    if (!wants(name)) return;
    const Shape shape = rows_shape(problem_, heads, length, dim);
    const TensorView view = float_view(arguments_.function, name, like);
    const bool whole = view.ndim == shape.ndim && std::equal(shape.extent, shape.extent + shape.ndim, view.shape);
    const DType dtype = whole ? view.dtype : problem_.dtype;
    const py::array array = new_array(shape, dtype, like);
    operand = place_rows(problem_, view_of(array, dtype));
    arrays[name] = array;
  }

  char* zeros_for(const char* name, const Shape& shape, DType dtype) {
    const py::array array = zeros(shape, dtype);
    arrays[name] = array;
    return static_cast<char*>(const_cast<void*>(array.data()));
  }

  double* doubles_for(const char* name, const Shape& shape) {
    return wants(name) ? reinterpret_cast<double*>(zeros_for(name, shape, DType::f64)) : nullptr;
  }

  // What the bias does not tell apart is summed as it is computed; axes of heads and batch are left to the caller,
  // unless that would take an array larger than the bias for every pair of query and key.
  void bias() {
    const TensorView& view = arguments_.bias;
    const bool one_key = view.ndim < 1 || view.extent(0) == 1, one_query = view.ndim < 2 || view.extent(1) == 1;
    if (one_key && problem_.kv_len != 1) {
      Shape shape = lse_shape(problem_);
      shape.append(1);
      gradients.row_sums = doubles_for("bias", shape);
    } else if (one_query && problem_.q_len != 1) {
      Shape shape = lse_shape(problem_);
      shape.extent[shape.ndim - 1] = 1;
      shape.append(problem_.kv_len);
      gradients.key_sums = zeros_for("bias", shape, problem_.dtype);
    } else {
      Shape shape;
      for (int axis = 0; axis < view.ndim; ++axis) shape.append(view.shape[axis]);
      const py::array array = zeros(shape, problem_.dtype);
      gradients.scores = place_scores(problem_, view_of(array, problem_.dtype));
      gradients.shares_scores = array.size() != problem_.batch * problem_.num_heads * problem_.q_len * problem_.kv_len;
      arrays["bias"] = array;
    }
  }

  const Problem& problem_;
  const AttentionArguments& arguments_;
  const py::sequence& wrt_;
};

// operands: grad_out, q, k, v, out, lse, grad_lse, grad_weights (with all axes, in the type of computation). Returns
// the gradients by name: those of q, k and v with all batch axes; that of the bias for all heads and batch entries or
// in its own shape; those of numbers per head or call for each row.
py::dict attention_backward(const char* function, const py::tuple& operands, const py::sequence& wrt,
                            py::handle option_values) {
  const Options& options = options_of(option_values);
  const TensorView q = float_view(function, "q", operands[1]);
  const TensorView k = key_view(function, operands[2], q.dtype);
  const TensorView v = value_view(function, operands[3], q.dtype, k.dtype);
  const AttentionArguments arguments = arguments_of(function, options, q, k, v);
  Problem problem = make_problem(arguments);
  const Shape shape = out_shape(problem);
  const TensorView dout = result_view(function, "grad_out", operands[0], shape, q.dtype);
  attach_out(problem, result_view(function, "out", operands[4], shape, q.dtype));
  attach_lse(problem, lse_view(function, operands[5], lse_shape(problem)));
  Results results(problem, arguments, wrt);
  results.gradients.dout = place_rows(problem, dout);
  if (!operands[6].is_none())
    results.gradients.dlse = place_per_row(problem, shaped_view(function, "grad_lse", operands[6], lse_shape(problem)));
  if (!operands[7].is_none()) {
    const TensorView dweights = shaped_view(function, "grad_weights", operands[7], weights_shape(problem));
    results.gradients.dweights = place_scores(problem, dweights);
  }
  results.allocate(operands);
  const BackwardPlan plan = make_backward_plan(problem, results.gradients, active_kernels(), options.num_threads);
  bool finished;
  {
    const CoreCall call_of_core(plan.flops);
    finished = attend_backward(problem, results.gradients, plan, interrupted);
  }
  if (!finished) throw py::error_already_set();
  return results.arrays;
}

}  // namespace

void register_backward(py::module_& module) { module.def("attention_backward", &attention_backward); }

}  // namespace selfattn::bindings
