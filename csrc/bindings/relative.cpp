// relative_attention() and its gradients: a score is the product of query and key plus the product of the query and a
// vector for the distance of query and key.
#include "bindings/attention.h"

namespace selfattn::bindings {
namespace {

// operands: the arrays q, k and v.
AttentionArguments relative_arguments(const char* function, const py::tuple& operands, py::handle given,
                                      py::handle option_values) {
  const Options& options = options_of(option_values);
  const RelativeInputs& inputs = Record<RelativeInputs>::in(given);
  AttentionArguments arguments = arguments_of(function, operands[0], operands[1], operands[2], options);
  arguments.r = narrower_view(function, "r", inputs.r, arguments.q.dtype);
  arguments.u = optional_view(inputs.u, DType::f64);
  arguments.w = optional_view(inputs.w, DType::f64);
  arguments.r_origin = inputs.r_origin;
  return arguments;
}

py::object relative_attention(const char* function, const py::tuple& operands, py::handle inputs, py::object out,
                              py::handle option_values) {
  return attend_to(relative_arguments(function, operands, inputs, option_values), std::move(out), operands[0]);
}

py::dict relative_attention_backward(const char* function, const py::tuple& operands, py::handle inputs,
                                     py::handle upstream, const py::sequence& wrt, py::handle option_values) {
  const AttentionArguments arguments = relative_arguments(function, operands, inputs, option_values);
  return gradients_of(arguments, operands, Record<GradientInputs>::in(upstream), wrt);
}

}  // namespace

void register_relative(py::module_& module) {
  module.def("relative_attention", &relative_attention);
  module.def("relative_attention_backward", &relative_attention_backward);
}

}  // namespace selfattn::bindings
