// The options of a call: _core.Options, which the Python layer fills from users' arguments. Calls do not change them.
#pragma once
#include <span>

#include "bindings/arrays.h"
#include "bindings/record.h"
#include "problem.h"

namespace selfattn::bindings {

// Of the types that keys and values may have.
template <>
inline constexpr std::int64_t enum_count<DType> = stored_count;

// The names by which users choose a precision, in the order of the core's enum.
constexpr const char* precision_names[] = {"highest", "high", "medium"};
template <>
inline constexpr std::int64_t enum_count<Precision> = std::size(precision_names);

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

// The number of each name, which is its index.
py::dict numbers_of(std::span<const char* const> names);

void register_options(py::module_& module);

}  // namespace selfattn::bindings
