// attention(): converts arguments from Python to a Problem, and returns results to Python.
#pragma once
#include "bindings/operands.h"
#include "bindings/options.h"
#include "plan.h"
#include "problem.h"

namespace selfattn::bindings {

// The array into which a call writes. If `direct`, it is `given`. Otherwise it is a new array, and deliver() copies it
// to `given` unless `given` is None. `direct` needs a given array that shares no memory with operands that are still to
// be read.
struct Destination {
  py::object given;  // or None
  py::array array;

  Destination(py::object out, bool direct, const Shape& shape, DType dtype, py::handle like);
  TensorView view(DType dtype) const { return view_of(array, dtype); }
  py::object deliver();  // the object to return, with the result in it
};

// Returns `out` alone if all others are None. Otherwise returns a tuple of `out` and those of the others that are not
// None.
py::object join(py::object out, const py::object& lse, const py::object& weights,
                const py::object& key_mass = py::none());

// Keys may have a narrower type than queries, as in a cache that saves memory. Values have the keys' type.
TensorView narrower_view(const char* function, const char* name, py::handle array, DType query);
TensorView key_view(const char* function, py::handle k, DType query);
TensorView value_view(const char* function, py::handle v, DType query, DType key);

// The requested results other than out, allocated and attached to the problem.
struct Extras {
  py::object lse = py::none(), weights = py::none(), key_mass = py::none();
  Extras(const AttentionArguments& arguments, Problem& problem);
  py::object join(py::object out) const { return bindings::join(std::move(out), lse, weights, key_mass); }
};

// Checks the arguments, computes into `out` or a new array like `like`, and returns the requested results.
py::object attend_to(const AttentionArguments& arguments, py::object out, py::handle like);

// What `explain` says of a plan, of the number of threads that execute it, and of what limits this number if it is
// known.
py::dict description_of(const Plan& plan, int threads, const char* threads_source = nullptr);

// The arguments of a call, from arrays.
AttentionArguments arguments_of(const char* function, py::handle q, py::handle k, py::handle v, const Options& options);

// Returns the gradients of a call by name. The gradients of q, k and v have all batch axes. If the bias is broadcast
// over keys or over queries, its gradient has all heads and batch entries, and the caller sums over them. Otherwise it
// has the shape of the bias. The gradients of r, u, w and T5's table have all heads and batch entries. The gradients of
// the scale, ALiBi's slopes and sinks have one number per query row; the caller sums these numbers. `operands` are the
// arrays q, k and v. The arrays of `given` have all axes at full length; grad_weights is in the type of computation.
py::dict gradients_of(const AttentionArguments& arguments, const py::tuple& operands, const GradientInputs& given,
                      const py::sequence& wrt);

void register_attention(py::module_& module);
void register_backward(py::module_& module);
void register_errors();
void register_layer(py::module_& module);
void register_linear(py::module_& module);
void register_varlen(py::module_& module);
void register_varlen_backward(py::module_& module);
void register_machine(py::module_& module);
void register_merge(py::module_& module);
void register_rehearsal(py::module_& module);
void register_relative(py::module_& module);
void register_streaming(py::module_& module);
void register_xla(py::module_& module);

}  // namespace selfattn::bindings
