// The options of a call: _core.Options, which the Python layer fills from users' arguments. A call does not change it.
#pragma once
#include "bindings/arrays.h"
#include "problem.h"

namespace selfattn::bindings {

// The words by which users choose a layout or a precision. The code of a word is its index here, and its value in the
// core's enum.
constexpr const char* layout_words[] = {"bhsd", "bshd"};
constexpr const char* precision_words[] = {"highest", "high", "medium"};

// An option that is an array: its name, its member of AttentionArguments, and the function that makes its view.
struct ArrayOption {
  const char* name;
  TensorView AttentionArguments::* argument;
  TensorView (*view)(const char* function, const char* name, py::handle array);
};

// The view of an array that the Python layer has already converted to `dtype`.
template <DType dtype>
TensorView converted_view(const char*, const char*, py::handle array) {
  return optional_view(array, dtype);
}

constexpr ArrayOption array_options[] = {
    {"mask", &AttentionArguments::mask, bool_view},
    {"bias", &AttentionArguments::bias, float_view},
    {"q_offset", &AttentionArguments::q_offset, converted_view<DType::i64>},
    {"q_lens", &AttentionArguments::q_lens, converted_view<DType::i64>},
    {"kv_lens", &AttentionArguments::kv_lens, converted_view<DType::i64>},
    {"kv_starts", &AttentionArguments::kv_starts, converted_view<DType::i64>},
    {"alibi_slopes", &AttentionArguments::alibi_slopes, converted_view<DType::f64>},
    {"sinks", &AttentionArguments::sinks, converted_view<DType::f64>},
    {"distance_bias", &AttentionArguments::distance_bias, converted_view<DType::f64>},
};

struct Options : Settings {
  py::object arrays[std::size(array_options)];  // in the order of array_options; null: absent
  bool return_lse = false, return_weights = false;
  bool exact = false;        // return out in the type of computation, and lse in float64
  bool same_tokens = false;  // k and v belong to the tokens of q: see Keys
  int num_threads = 0;       // 0: the default
};

// The options in a _core.Options. Throws TypeError for any other object.
const Options& options_of(py::handle object);

AttentionArguments arguments_of(const char* function, const Options& options, const TensorView& q, const TensorView& k,
                                const TensorView& v);

// Whether `out` may share memory with an operand, so that writing `out` could change numbers that are still to be read.
bool meets_any(const TensorView& out, const AttentionArguments& arguments);

void register_options(py::module_& module);

}  // namespace selfattn::bindings
