#include "bindings/attention.h"

#include <cstring>
#include <utility>
#include <vector>

#include "attend.h"
#include "parallel.h"
#include "registry.h"

namespace selfattn::bindings {

Destination::Destination(py::object out, bool direct, const Shape& shape, DType dtype, py::handle like)
    : given(std::move(out)), array(direct ? py::reinterpret_borrow<py::array>(given) : new_array(shape, dtype, like)) {}

py::object Destination::deliver() {
  if (given.is_none() || array.is(given)) return std::move(array);
  if (Rehearsal::active()) return std::move(given);
  given.attr("__setitem__")(py::ellipsis(), array);
  return std::move(given);
}

Extras::Extras(const AttentionArguments& arguments, Problem& problem) {
  if (arguments.return_lse) {
    const DType dtype = arguments.exact ? DType::f64 : problem.dtype;
    const py::array array = new_array(lse_shape(problem), dtype);
    attach_lse(problem, view_of(array, dtype));
    lse = array;
  }
  if (arguments.return_weights) {
    const py::array array = new_array(weights_shape(problem), problem.dtype);
    attach_weights(problem, view_of(array, problem.dtype));
    weights = array;
  }
  if (arguments.return_key_mass) {
    py::array array = new_array(key_mass_shape(problem), problem.dtype);
    std::memset(array.mutable_data(), 0, static_cast<std::size_t>(array.nbytes()));
    attach_key_mass(problem, view_of(array, problem.dtype));
    key_mass = std::move(array);
  }
}

py::object join(py::object out, const py::object& lse, const py::object& weights, const py::object& key_mass) {
  if (lse.is_none() && weights.is_none() && key_mass.is_none()) return out;
  py::list results;
  results.append(std::move(out));
  for (const py::object* extra : {&lse, &weights, &key_mass})
    if (!extra->is_none()) results.append(*extra);
  return py::tuple(results);
}

TensorView narrower_view(const char* function, const char* name, py::handle array, DType query) {
  const TensorView view = float_view(function, name, array);
  return takes_less(view.dtype, query) ? view : matching_view(function, name, array, "q", query);
}

TensorView key_view(const char* function, py::handle k, DType query) { return narrower_view(function, "k", k, query); }

TensorView value_view(const char* function, py::handle v, DType query, DType key) {
  return matching_view(function, "v", v, key == query ? "q" : "k", key);
}

py::object attend_to(const AttentionArguments& arguments, py::object out, py::handle like) {
  Problem problem = make_problem(arguments);
  const DType dtype = arguments.exact ? problem.dtype : arguments.q.dtype;
  bool direct = false;
  if (!out.is_none()) {
    const py::array given = py::reinterpret_borrow<py::array>(out);
    check_out(arguments.function, given, out_shape(problem), dtype);
    direct = !meets_any(view_of(given, dtype), arguments);
  }
  Destination result(std::move(out), direct, out_shape(problem), dtype, like);
  attach_out(problem, result.view(dtype));
  const Extras extras(arguments, problem);
  const Plan plan = make_plan(problem, active_kernels());
  const int threads = threads_for(plan, arguments.num_threads);
  bool finished;
  {
    const CoreCall call_of_core(plan.flops);
    finished = attend(problem, plan, threads, interrupted);
  }
  if (!finished) throw py::error_already_set();
  return extras.join(result.deliver());
}

AttentionArguments arguments_of(const char* function, py::handle q, py::handle k, py::handle v,
                                const Options& options) {
  const TensorView query = float_view(function, "q", q);
  const TensorView key = key_view(function, k, query.dtype);
  const TensorView value = value_view(function, v, query.dtype, key.dtype);
  return arguments_of(function, options, query, key, value);
}

namespace {

py::object attention(py::handle q, py::handle k, py::handle v, py::object out, py::handle option_values) {
  return attend_to(arguments_of("attention", q, k, v, options_of(option_values)), std::move(out), q);
}

// Attention on behalf of another function, whose name appears in error messages.
py::object attention_for(const char* function, py::handle q, py::handle k, py::handle v, py::handle option_values) {
  return attend_to(arguments_of(function, q, k, v, options_of(option_values)), py::none(), q);
}

}  // namespace

py::dict description_of(const Plan& plan, int threads, const char* threads_source) {
  py::dict d;
  d["isa"] = plan.kernels->name;
  d["kernel"] = plan.attend->name;
  d["unit"] = plan.attend->unit;
  d["reason"] = plan.reason;
  d["query_rows"] = plan.rows;
  d["block_rows"] = plan.block_rows;
  d["key_block"] = plan.key_block;
  d["range_keys"] = plan.range_keys;
  d["ranges"] = plan.ranges;
  d["tasks"] = plan.tasks;
  d["threads"] = threads;
  if (threads_source) d["threads_source"] = threads_source;
  d["scratch_bytes_per_thread"] = plan.thread_bytes;
  d["shared_bytes"] = plan.shared_bytes;
  py::list copied;
  if (plan.copies_queries) copied.append("q");
  if (plan.copies_keys) copied.append("k");
  if (plan.copies_values) copied.append("v");
  if (plan.copies_out) copied.append("out");
  d["copied_blockwise"] = copied;
  d["flops"] = plan.flops;
  return d;
}

namespace {

py::dict explain(py::handle q, py::handle k, py::handle v, py::handle option_values) {
  const AttentionArguments arguments = arguments_of("explain", q, k, v, options_of(option_values));
  const Plan plan = make_plan(make_problem(arguments), active_kernels());
  forget_last_call();
  const int given = arguments.num_threads, threads = threads_for(plan, given);
  const ThreadDefault limit = given > 0 ? ThreadDefault{given, "num_threads argument"} : default_threads();
  const bool few = threads == 1 && limit.count > 1;
  return description_of(plan, threads, few ? "one thread is enough for this much work" : limit.source);
}

// For each query (..., q_len): its position, and the begin and the end of the keys that it may see, before mask and
// bias. Checks the arguments as `attention` does.
py::array_t<std::int64_t> visible_keys_of(py::handle q, py::handle k, py::handle v, py::handle option_values) {
  const Problem problem = make_problem(arguments_of("attention", q, k, v, options_of(option_values)));
  std::vector<py::ssize_t> shape(problem.batch_shape.extents().begin(), problem.batch_shape.extents().end());
  shape.insert(shape.end(), {problem.q_len, 3});
  py::array_t<std::int64_t> found(shape);
  std::int64_t* next = found.mutable_data();
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const ValidKeys valid = valid_keys(problem, b);
    for (std::int64_t query = 0; query < problem.q_len; ++query) {
      const KeyRange keys = query < problem.queries_of(b) ? visible_keys(query, valid) : KeyRange{0, 0};
      for (const std::int64_t number : {query + valid.offset, keys.begin, keys.end}) *next++ = number;
    }
  }
  return found;
}

}  // namespace

void register_attention(py::module_& module) {
  module.def("attention", &attention);
  module.def("attention_for", &attention_for);
  module.def("check_out", [](const char* function, const py::array& out, const py::array& like, const char* name) {
    const TensorView view = float_view(function, name, like);
    check_out(function, out, shape_of(view), view.dtype);
  });
  module.def("check_own_memory", &check_own_memory);
  module.def("explain", &explain);
  module.def("visible_keys", &visible_keys_of);
}

}  // namespace selfattn::bindings
