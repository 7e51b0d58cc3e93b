// The options of a call: _core.Options, which the Python layer fills from users' arguments. A call does not change it.
#pragma once
#include "bindings/arrays.h"
#include "problem.h"

namespace selfattn::bindings {

// An option that is an array. Null if it is absent.
struct ArrayReference : py::object {
  using py::object::object;
};

using Options = AttentionOptions<ArrayReference>;

// The options in a _core.Options. Throws TypeError for any other object.
const Options& options_of(py::handle object);

AttentionArguments arguments_of(const char* function, const Options& options, const TensorView& q, const TensorView& k,
                                const TensorView& v);

// Whether `out` may share memory with an operand, so that writing `out` could change numbers that are still to be read.
bool meets_any(const TensorView& out, const AttentionArguments& arguments);

void register_options(py::module_& module);

}  // namespace selfattn::bindings
