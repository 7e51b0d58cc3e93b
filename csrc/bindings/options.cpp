#include "bindings/options.h"

#include <algorithm>

namespace selfattn::bindings {

// The names by which users choose a layout. The number of a name is its index here, and its value in the core's enum.
constexpr const char* layout_names[] = {"bhsd", "bshd"};
template <>
inline constexpr std::int64_t enum_count<Layout> = std::size(layout_names);

static bool read(PyObject* value, ArrayReference& to) {
  const bool absent = value == Py_None;
  if (!absent && !py::isinstance<py::array>(value)) return false;
  to = absent ? ArrayReference() : py::reinterpret_borrow<ArrayReference>(value);
  return true;
}

static PyObject* written(const ArrayReference& array) { return Py_NewRef(array ? array.ptr() : Py_None); }

namespace {

constexpr Field<Options> fields[] = {
#define SELFATTN_ARRAY(name, elements) field<Options, &Options::name>(#name),
#define SELFATTN_OPTION(type, name, initial) field<Options, &Options::name>(#name),
#include "option_list.h"
};

// Functions that make a view of an array option. Each is named after a kind of elements in option_list.h.
namespace view_of_elements {
constexpr auto boolean = bool_view, real = float_view;
// The Python layer has already converted these.
constexpr auto i64 = [](const char*, const char*, py::handle array) { return optional_view(array, DType::i64); };
constexpr auto f64 = [](const char*, const char*, py::handle array) { return optional_view(array, DType::f64); };
}  // namespace view_of_elements

constexpr const char* array_names[] = {
#define SELFATTN_ARRAY(name, elements) #name,
#include "option_list.h"
};

// The names of all options, or of those that are arrays.
py::tuple option_names(bool arrays) {
  const std::size_t count = arrays ? std::size(array_names) : std::size(fields);
  py::tuple names(count);
  for (std::size_t i = 0; i < count; ++i) names[i] = py::str(arrays ? array_names[i] : fields[i].name);
  return names;
}

// The types that keys and values may have, by name.
py::dict stored_types() {
  py::dict d;
  for (int number = 0; number < stored_count; ++number) {
    const ElementType& type = element_types[number];
    d[type.name] =
        py::dict(py::arg("number") = number, py::arg("memory") = type.memory, py::arg("elements") = type.elements,
                 py::arg("word_bytes") = type.bytes, py::arg("codes") = type.codes);
  }
  return d;
}

}  // namespace

py::dict numbers_of(std::span<const char* const> names) {
  py::dict d;
  for (std::size_t number = 0; number < names.size(); ++number) d[names[number]] = number;
  return d;
}

const Options& options_of(py::handle object) { return Record<Options>::in(object); }

AttentionArguments arguments_of(const char* function, const Options& options, const TensorView& q, const TensorView& k,
                                const TensorView& v) {
  AttentionArguments a;
  a.function = function;
  a.q = q;
  a.k = k;
  a.v = v;
#define SELFATTN_ARRAY(name, elements) \
  if (options.name) a.name = view_of_elements::elements(function, #name, options.name);
#define SELFATTN_OPTION(type, name, initial) a.name = options.name;
#include "option_list.h"
  return a;
}

bool meets_any(const TensorView& out, const AttentionArguments& a) {
  const TensorView* const operands[] = {
#define SELFATTN_ARRAY(name, elements) &a.name,
#include "option_list.h"
      &a.q, &a.k, &a.v, &a.r, &a.u, &a.w};
  return std::ranges::any_of(operands, [&](const TensorView* operand) { return meet(out, *operand); });
}

void register_options(py::module_& module) {
  Record<Options>::add(module, "Options", fields);
  module.attr("LAYOUTS") = numbers_of(layout_names);
  module.attr("PRECISIONS") = numbers_of(precision_names);
  module.attr("ELEMENT_TYPES") = stored_types();
  module.attr("OPTIONS") = option_names(false);
  module.attr("ARRAY_OPTIONS") = option_names(true);
}

}  // namespace selfattn::bindings
