// AttentionState.
#include "streaming.h"

#include <memory>
#include <utility>

#include "attend.h"
#include "bindings/attention.h"
#include "bindings/cache_arguments.h"
#include "registry.h"

namespace selfattn::bindings {
namespace {

// The queries and options of a state, and its sums. The Python layer does not change the arrays of queries and options.
struct HeldState {
  static constexpr const char* capsule_name = "selfattn.AttentionState";

  HeldState(py::object queries, py::object own, std::int64_t kv_len, std::int64_t first)
      : q(std::move(queries)), options(std::move(own)), state(kv_len, first) {}

  const py::object q, options;  // without mask and bias: each piece has its own
  AttentionState state;
};

// Keys that have a shape, but no memory. They serve to check the options before the first piece comes.
struct NoKeys {
  NoKeys(const TensorView& q, Layout layout, std::int64_t kv_len) {
    view = {nullptr, q.dtype, q.ndim, shape, strides};
    for (int axis = 0; axis < q.ndim; ++axis) shape[axis] = q.shape[axis];
    const bool heads_last = layout == Layout::bshd && q.ndim > 2;
    if (q.ndim > 2) shape[q.ndim - (heads_last ? 2 : 3)] = 1;
    if (q.ndim > 1) shape[q.ndim - (heads_last ? 3 : 2)] = kv_len;
  }
  NoKeys(const NoKeys&) = delete;
  NoKeys& operator=(const NoKeys&) = delete;

  TensorView view;
  std::int64_t shape[max_axes] = {}, strides[max_axes] = {};
};

// Checks the options, whose mask and bias cover all keys. `own` are the same options without mask and bias.
py::capsule make_state(py::object q, std::int64_t kv_len, std::int64_t first, py::handle option_values,
                       py::object own) {
  constexpr const char* function = "AttentionState";
  const Options& options = options_of(option_values);
  const TensorView query = float_view(function, "q", q);
  const NoKeys keys(query, options.layout, kv_len);
  make_problem(arguments_of(function, options, query, keys.view, keys.view));
  return capsule_of(std::make_unique<HeldState>(std::move(q), std::move(own), kv_len, first));
}

// Absorbs k and v, whose first key is key `first`. mask and bias cover only these keys.
void absorb(const py::capsule& capsule, py::handle k, py::handle v, std::int64_t first, py::handle mask,
            py::handle bias) {
  constexpr const char* function = "AttentionState.absorb";
  auto& held = held_by<HeldState>(capsule);
  held.state.check(function);
  const Options& options = options_of(held.options);
  AttentionArguments arguments = arguments_of(function, held.q, k, v, options);
  arguments.mask = bool_view(function, "mask", mask);
  if (!bias.is_none()) arguments.bias = float_view(function, "bias", bias);
  const Problem problem = held.state.problem_of(arguments, first);
  const Plan plan = make_plan(problem, active_kernels());
  const int threads = threads_for(plan, options.num_threads);
  bool finished;
  {
    const CoreCall call_of_core(plan.flops);
    finished = held.state.absorb(problem, plan, threads, interrupted);
  }
  if (!finished) throw py::error_already_set();
}

std::int64_t next_key(const py::capsule& capsule) { return held_by<HeldState>(capsule).state.next(); }

py::tuple state_result(const py::capsule& capsule, const py::object& out) {
  constexpr const char* function = "AttentionState.result";
  const auto& held = held_by<HeldState>(capsule);
  held.state.check(function);
  Problem problem = held.state.results(function);
  const DType dtype = problem.query.dtype;
  if (!out.is_none()) check_out(function, py::reinterpret_borrow<py::array>(out), out_shape(problem), dtype);
  Destination result(out, !out.is_none(), out_shape(problem), dtype, held.q);
  attach_out(problem, result.view(dtype));
  const py::array lse = new_array(lse_shape(problem), problem.dtype);
  attach_lse(problem, view_of(lse, problem.dtype));
  bool finished;
  {
    const CoreCall call_of_core(static_cast<double>(result.array.size()));
    finished = held.state.finish(problem, active_kernels(), options_of(held.options).num_threads, interrupted);
  }
  if (!finished) throw py::error_already_set();
  return py::make_tuple(result.deliver(), lse);
}

}  // namespace

void register_streaming(py::module_& module) {
  module.def("make_state", &make_state);
  module.def("absorb", &absorb);
  module.def("next_key", &next_key);
  module.def("state_result", &state_result);
}

}  // namespace selfattn::bindings
