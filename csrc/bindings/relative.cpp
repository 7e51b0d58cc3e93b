// relative_attention() and its gradients: scores are the products of queries and keys plus the products of queries and
// a vector for their distance.
#include "bindings/attention.h"

namespace selfattn::bindings {
namespace {

// terms: r, u and w (doubles), r_origin.
AttentionArguments relative_arguments(const char* function, py::handle q, py::handle k, py::handle v,
                                      const py::tuple& terms, const Options& options) {
  AttentionArguments arguments = arguments_of(function, q, k, v, options);
  arguments.r = narrower_view(function, "r", terms[0], arguments.q.dtype);
  arguments.u = optional_view(terms[1], DType::f64);
  arguments.w = optional_view(terms[2], DType::f64);
  arguments.r_origin = terms[3].cast<std::int64_t>();
  return arguments;
}

py::object relative_attention(const char* function, const py::tuple& inputs, const py::tuple& terms, py::object out,
                              py::handle option_values) {
  const Options& options = options_of(option_values);
  const AttentionArguments arguments = relative_arguments(function, inputs[0], inputs[1], inputs[2], terms, options);
  return attend_to(arguments, options, std::move(out), inputs[0]);
}

// operands: as for attention_backward.
py::dict relative_attention_backward(const char* function, const py::tuple& operands, const py::tuple& terms,
                                     const py::sequence& wrt, py::handle option_values) {
  const Options& options = options_of(option_values);
  const AttentionArguments arguments =
      relative_arguments(function, operands[1], operands[2], operands[3], terms, options);
  return gradients_of(arguments, options, operands, wrt);
}

}  // namespace

void register_relative(py::module_& module) {
  module.def("relative_attention", &relative_attention);
  module.def("relative_attention_backward", &relative_attention_backward);
}

}  // namespace selfattn::bindings
