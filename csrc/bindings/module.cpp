#include "bindings/attention.h"
#include "bindings/cache_arguments.h"
#include "parallel.h"

PYBIND11_MODULE(_core, module) {
  selfattn::prepare_for_fork();
  selfattn::bindings::register_errors();
  selfattn::bindings::register_operands(module);
  selfattn::bindings::register_options(module);
  selfattn::bindings::register_attention(module);
  selfattn::bindings::register_backward(module);
  selfattn::bindings::register_cache(module);
  selfattn::bindings::register_pages(module);
  selfattn::bindings::register_varlen(module);
  selfattn::bindings::register_varlen_backward(module);
  selfattn::bindings::register_layer(module);
  selfattn::bindings::register_linear(module);
  selfattn::bindings::register_machine(module);
  selfattn::bindings::register_merge(module);
  selfattn::bindings::register_rehearsal(module);
  selfattn::bindings::register_relative(module);
  selfattn::bindings::register_streaming(module);
  selfattn::bindings::register_xla(module);
}
