#include "bindings/options.h"

#include <algorithm>
#include <span>
#include <type_traits>
#include <utility>

#include "bindings/record.h"

namespace selfattn::bindings {
namespace {

template <std::size_t i>
constexpr Field<Options> array_field() {
  return {array_options[i].name,
          [](Options& options, PyObject* value) {
            const bool absent = value == Py_None;
            if (!absent && !py::isinstance<py::array>(value)) return false;
            options.arrays[i] = absent ? py::object() : py::reinterpret_borrow<py::object>(value);
            return true;
          },
          [](const Options& options) {
            PyObject* array = options.arrays[i].ptr();
            return Py_NewRef(array ? array : Py_None);
          }};
}

// A field whose value is one of the codes 0 to count - 1.
template <auto member, std::int64_t count>
constexpr Field<Options> code_field(const char* name) {
  return {name,
          [](Options& options, PyObject* value) {
            std::int64_t code = 0;
            if (!read(value, code) || code < 0 || code >= count) return false;
            auto& to = options.*member;
            to = static_cast<std::remove_reference_t<decltype(to)>>(code);
            return true;
          },
          [](const Options& options) { return written(static_cast<std::int64_t>(options.*member)); }};
}

constexpr Field<Options> setting_fields[] = {
    code_field<&Options::layout, std::size(layout_words)>("layout"),
    field<Options, &Options::causal>("causal"),
    field<Options, &Options::window_left>("window_left"),
    field<Options, &Options::window_right>("window_right"),
    field<Options, &Options::scale>("scale"),
    field<Options, &Options::softcap>("softcap"),
    code_field<&Options::precision, std::size(precision_words)>("precision"),
    field<Options, &Options::distance_origin>("distance_origin"),
    field<Options, &Options::dropout>("dropout"),
    field<Options, &Options::seed>("seed"),
    field<Options, &Options::return_lse>("return_lse"),
    field<Options, &Options::return_weights>("return_weights"),
    field<Options, &Options::exact>("exact"),
    field<Options, &Options::same_tokens>("same_tokens"),
    code_field<&Options::num_threads, 1 << 30>("num_threads"),
};

constexpr std::size_t array_count = std::size(array_options);
constexpr std::size_t count = array_count + std::size(setting_fields);

struct Fields {
  Field<Options> all[count];
};

template <std::size_t... i>
constexpr Fields all_fields(std::index_sequence<i...>) {
  Fields fields{{array_field<i>()...}};
  std::copy(std::begin(setting_fields), std::end(setting_fields), fields.all + array_count);
  return fields;
}

constexpr Fields fields = all_fields(std::make_index_sequence<array_count>());

py::dict codes(std::span<const char* const> words) {
  py::dict d;
  for (std::size_t code = 0; code < words.size(); ++code) d[words[code]] = code;
  return d;
}

// The types that keys and values may have, by name.
py::dict dtype_codes() {
  py::dict d;
  for (int code = 0; code < dtype_count; ++code)
    if (const DType dtype = computed_in(static_cast<DType>(code)); dtype == DType::f32 || dtype == DType::f64)
      d[element_types[code].name] = code;
  return d;
}

}  // namespace

const Options& options_of(py::handle object) { return Record<Options>::in(object); }

AttentionArguments arguments_of(const char* function, const Options& options, const TensorView& q, const TensorView& k,
                                const TensorView& v) {
  AttentionArguments a;
  static_cast<Settings&>(a) = options;
  a.function = function;
  a.q = q;
  a.k = k;
  a.v = v;
  if (options.same_tokens) a.keys = Keys::same_tokens;
  for (std::size_t i = 0; i < array_count; ++i) {
    const ArrayOption& option = array_options[i];
    if (options.arrays[i]) a.*option.argument = option.view(function, option.name, options.arrays[i]);
  }
  return a;
}

bool meets_any(const TensorView& out, const AttentionArguments& a) {
  for (const TensorView* operand : {&a.q, &a.k, &a.v, &a.r, &a.u, &a.w})
    if (meet(out, *operand)) return true;
  return std::ranges::any_of(array_options, [&](const ArrayOption& option) { return meet(out, a.*option.argument); });
}

void register_options(py::module_& module) {
  Record<Options>::add(module, "Options", fields.all);
  module.attr("LAYOUTS") = codes(layout_words);
  module.attr("PRECISIONS") = codes(precision_words);
  module.attr("DTYPES") = dtype_codes();
}

}  // namespace selfattn::bindings
