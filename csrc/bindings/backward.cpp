// attention_backward(): the gradients of attention.
#include "backward.h"

#include <algorithm>

#include "bindings/attention.h"
#include "bindings/gradients.h"
#include "registry.h"

namespace selfattn::bindings {
namespace {

// Allocates the arrays of the gradients that are wanted.
class Results {
 public:
  Results(Problem& problem, const AttentionArguments& arguments, const py::sequence& wrt)
      : problem_(problem), arguments_(arguments), wrt_(wrt) {}

  py::dict arrays;
  Gradients gradients;

  void allocate(const py::tuple& operands) {
    place("q", gradients.query, operands[0], problem_.num_heads, problem_.q_len, problem_.head_dim);
    place("k", gradients.key, operands[1], problem_.num_kv_heads, problem_.kv_len, problem_.head_dim);
    place("v", gradients.value, operands[2], problem_.num_kv_heads, problem_.kv_len, problem_.value_dim);
    if (wants("bias")) arrays["bias"] = bias_gradient(problem_, arguments_.bias, gradients);
    const Shape rows = lse_shape(problem_);
    gradients.scale = doubles_for("scale", rows);
    gradients.slopes = doubles_for("alibi_slopes", rows);
    gradients.sinks = doubles_for("sinks", rows);
    Shape distances = rows;
    distances.extent[distances.ndim - 1] = problem_.distance_bias.count;
    gradients.distance_bias = doubles_for("t5", distances);
    Shape heads = rows;
    heads.extent[heads.ndim - 1] = problem_.head_dim;
    gradients.key_bias = doubles_for("u", heads);
    gradients.relative_bias = doubles_for("w", heads);
    heads.extent[heads.ndim - 1] = problem_.relative.count;
    heads.append(problem_.head_dim);
    if (!wants("r")) return;
    const py::array relative = zeros(heads, problem_.dtype);
    gradients.relative = static_cast<char*>(const_cast<void*>(relative.data()));
    arrays["r"] = relative;
  }

 private:
  bool wants(const char* name) const { return wrt_.contains(name); }

  // Allocates the gradient of q, k or v. It has the operand's dtype if the operand has all axes and the gradient is not
  // wanted exact. Otherwise it has the type of computation, because the caller still has to add to it or to sum over
  // the axes that were broadcast.
  void place(const char* name, Operand& operand, py::handle like, std::int64_t heads, std::int64_t length,
             std::int64_t dim) {
    if (!wants(name)) return;
    const Shape shape = rows_shape(problem_, heads, length, dim);
    const TensorView view = float_view(arguments_.function, name, like);
    const bool whole = view.ndim == shape.ndim && std::equal(shape.extent, shape.extent + shape.ndim, view.shape);
    const DType dtype = whole && !arguments_.exact ? view.dtype : problem_.dtype;
    const py::array array = new_array(shape, dtype, like);
    operand = place_rows(problem_, view_of(array, dtype));
    arrays[name] = array;
  }

  double* doubles_for(const char* name, const Shape& shape) {
    if (!wants(name)) return nullptr;
    const py::array array = zeros(shape, DType::f64);
    arrays[name] = array;
    return static_cast<double*>(const_cast<void*>(array.data()));
  }

  Problem& problem_;
  const AttentionArguments& arguments_;
  const py::sequence& wrt_;
};

}  // namespace

py::dict gradients_of(const AttentionArguments& arguments, const py::tuple& operands, const GradientInputs& given,
                      const py::sequence& wrt) {
  const char* function = arguments.function;
  const TensorView& q = arguments.q;
  Problem problem = make_problem(arguments);
  const Shape shape = out_shape(problem);
  const TensorView dout = result_view(function, "grad_out", given.grad_out, shape, q.dtype);
  attach_out(problem, result_view(function, "out", given.out, shape, q.dtype));
  attach_lse(problem, lse_view(function, given.lse, lse_shape(problem)));
  Results results(problem, arguments, wrt);
  results.gradients.dout = place_rows(problem, dout);
  if (!given.grad_lse.is_none())
    results.gradients.dlse =
        place_per_row(problem, shaped_view(function, "grad_lse", given.grad_lse, lse_shape(problem)));
  if (!given.grad_weights.is_none()) {
    const TensorView dweights = shaped_view(function, "grad_weights", given.grad_weights, weights_shape(problem));
    results.gradients.dweights = place_scores(problem, dweights);
  }
  results.allocate(operands);
  const BackwardPlan plan = make_backward_plan(problem, results.gradients, active_kernels());
  const int threads = threads_for(plan, arguments.num_threads);
  bool finished;
  {
    const CoreCall call_of_core(plan.flops);
    finished = attend_backward(problem, results.gradients, plan, threads, interrupted);
  }
  if (!finished) throw py::error_already_set();
  return results.arrays;
}

namespace {

py::dict attention_backward(const char* function, const py::tuple& operands, py::handle upstream,
                            const py::sequence& wrt, py::handle option_values) {
  const AttentionArguments arguments =
      arguments_of(function, operands[0], operands[1], operands[2], options_of(option_values));
  return gradients_of(arguments, operands, Record<GradientInputs>::in(upstream), wrt);
}

// Checks that the gradient of a result has the shape of `like`.
void check_shape(const char* function, const char* name, py::handle array, py::handle like) {
  shaped_view(function, name, array, shape_of(float_view(function, name, like)));
}

// Checks that the gradient of a result has the shape of `like`, and its dtype or the type of computation.
void check_gradient(const char* function, const char* name, py::handle array, py::handle like) {
  const TensorView result = float_view(function, name, like);
  result_view(function, name, array, shape_of(result), result.dtype);
}

}  // namespace

void register_backward(py::module_& module) {
  module.def("attention_backward", &attention_backward);
  module.def("check_shape", &check_shape);
  module.def("check_gradient", &check_gradient);
}

}  // namespace selfattn::bindings
