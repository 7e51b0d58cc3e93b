// attention(): arguments from Python to a Problem, and results back.
#pragma once
#include "bindings/options.h"
#include "plan.h"
#include "problem.h"

namespace selfattn::bindings {

// Where a call writes: straight into `given` where that is there and may be written early, else into a new array.
struct Destination {
  py::object given;  // or None
  py::array array;

  Destination(py::object out, bool direct, const Shape& shape, DType dtype, py::handle like);
  TensorView view(DType dtype) const { return view_of(array, dtype); }
  py::object deliver();  // what the caller gets, filled
};

// out alone, or the tuple of what is not None.
py::object join(py::object out, const py::object& lse, const py::object& weights);

// Keys may be narrower than queries, as in a cache that saves memory; values are of the keys' type.
TensorView narrower_view(const char* function, const char* name, py::handle array, DType query);
TensorView key_view(const char* function, py::handle k, DType query);
TensorView value_view(const char* function, py::handle v, DType query, DType key);

// Results other than out that were asked for, allocated and attached.
struct Extras {
  py::object lse = py::none(), weights = py::none();
  Extras(const Options& options, Problem& problem);
  py::object join(py::object out) const { return bindings::join(std::move(out), lse, weights); }
};

// Checks the arguments, computes into `out` or a new array like `like`, and returns what the options ask for.
py::object attend_to(const AttentionArguments& arguments, const Options& options, py::object out, py::handle like);

// Runs the plan; raises what a signal handler raised.
void run_attention(const Problem& problem, const Plan& plan);

py::dict describe_plan(const Problem& problem, const Plan& plan, const Options& options);

void register_attention(py::module_& module);
void register_layer(py::module_& module);
void register_varlen(py::module_& module);
void register_machine(py::module_& module);
void register_merge(py::module_& module);
void register_relative(py::module_& module);

}  // namespace selfattn::bindings
