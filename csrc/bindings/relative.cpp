// relative_attention(): attention that adds products of queries with a vector per distance to those with keys.
#include "bindings/attention.h"

namespace selfattn::bindings {
namespace {

constexpr const char* function = "relative_attention";

// terms: r, u and w (doubles), r_origin.
py::object relative_attention(const py::tuple& inputs, const py::tuple& terms, py::object out,
                              py::handle option_values) {
  const Options& options = options_of(option_values);
  const TensorView q = float_view(function, "q", inputs[0]);
  const TensorView k = key_view(function, inputs[1], q.dtype);
  const TensorView v = value_view(function, inputs[2], q.dtype, k.dtype);
  AttentionArguments arguments = arguments_of(function, options, q, k, v);
  arguments.r = narrower_view(function, "r", terms[0], q.dtype);
  arguments.u = optional_view(terms[1], DType::f64);
  arguments.w = optional_view(terms[2], DType::f64);
  arguments.r_origin = terms[3].cast<std::int64_t>();
  return attend_to(arguments, options, std::move(out), inputs[0]);
}

}  // namespace

void register_relative(py::module_& module) { module.def("relative_attention", &relative_attention); }

}  // namespace selfattn::bindings
