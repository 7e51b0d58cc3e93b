#include "bindings/options.h"

#include <algorithm>
#include <array>
#include <new>
#include <optional>
#include <span>
#include <utility>

namespace selfattn::bindings {
namespace {

// Not a class of pybind11's: these register each object, which is slower and terminates the process if memory runs out.
struct OptionsObject {
  PyObject_HEAD Options options;
};

Options& held(PyObject* object) { return reinterpret_cast<OptionsObject*>(object)->options; }

PyTypeObject* options_type = nullptr;

// One field of the type. `set` returns whether the field accepts the value.
struct Field {
  const char* name;
  bool (*set)(Options& options, PyObject* value);
  PyObject* (*get)(const Options& options);
};

template <std::size_t i>
constexpr Field array_field() {
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

bool read(PyObject* value, bool& to) {
  to = value == Py_True;
  return PyBool_Check(value);
}

bool read(PyObject* value, double& to) {
  if (!PyFloat_Check(value)) return false;
  to = PyFloat_AS_DOUBLE(value);
  return true;
}

bool read(PyObject* value, std::int64_t& to) {
  int overflow = 0;
  if (!PyLong_Check(value)) return false;
  to = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0;
}

bool read(PyObject* value, std::uint64_t& to) {
  if (!PyLong_Check(value)) return false;
  to = PyLong_AsUnsignedLongLong(value);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // negative or too large
  return false;
}

bool read(PyObject* value, std::optional<double>& to) {
  to.reset();
  return value == Py_None || read(value, to.emplace());
}

template <class Code>
bool read_code(PyObject* value, Code& to, std::int64_t count) {
  std::int64_t n = 0;
  if (!read(value, n) || n < 0 || n >= count) return false;
  to = static_cast<Code>(n);
  return true;
}

bool read(PyObject* value, Layout& to) { return read_code(value, to, std::size(layout_words)); }
bool read(PyObject* value, Precision& to) { return read_code(value, to, std::size(precision_words)); }
bool read(PyObject* value, int& to) { return read_code(value, to, std::int64_t{1} << 30); }

PyObject* written(bool value) { return PyBool_FromLong(value); }
PyObject* written(double value) { return PyFloat_FromDouble(value); }
PyObject* written(std::int64_t value) { return PyLong_FromLongLong(value); }
PyObject* written(std::uint64_t value) { return PyLong_FromUnsignedLongLong(value); }
PyObject* written(int value) { return PyLong_FromLong(value); }
PyObject* written(Layout value) { return PyLong_FromLong(static_cast<long>(value)); }
PyObject* written(Precision value) { return PyLong_FromLong(static_cast<long>(value)); }
PyObject* written(const std::optional<double>& value) { return value ? written(*value) : Py_NewRef(Py_None); }

template <auto member>
constexpr Field field(const char* name) {
  return {name, [](Options& options, PyObject* value) { return read(value, options.*member); },
          [](const Options& options) { return written(options.*member); }};
}

constexpr Field setting_fields[] = {
    field<&Options::layout>("layout"),
    field<&Options::causal>("causal"),
    field<&Options::window_left>("window_left"),
    field<&Options::window_right>("window_right"),
    field<&Options::scale>("scale"),
    field<&Options::softcap>("softcap"),
    field<&Options::precision>("precision"),
    field<&Options::distance_origin>("distance_origin"),
    field<&Options::dropout>("dropout"),
    field<&Options::seed>("seed"),
    field<&Options::return_lse>("return_lse"),
    field<&Options::return_weights>("return_weights"),
    field<&Options::exact>("exact"),
    field<&Options::num_threads>("num_threads"),
};

constexpr std::size_t array_count = std::size(array_options);
constexpr std::size_t count = array_count + std::size(setting_fields);

template <std::size_t... i>
constexpr std::array<Field, count> all_fields(std::index_sequence<i...>) {
  std::array<Field, count> all{array_field<i>()...};
  std::copy(std::begin(setting_fields), std::end(setting_fields), all.begin() + array_count);
  return all;
}

constexpr std::array<Field, count> fields = all_fields(std::make_index_sequence<array_count>());

PyObject* make(const Options& from) {
  PyObject* object = options_type->tp_alloc(options_type, 0);
  if (object) ::new (&held(object)) Options(from);
  return object;
}

PyObject* construct(PyObject*, PyObject* const*, std::size_t given, PyObject* keywords) {
  if (PyVectorcall_NARGS(given) == 0 && !keywords) return make(Options());
  PyErr_SetString(PyExc_TypeError, "Options() takes no arguments: set its fields");
  return nullptr;
}

PyObject* copy(PyObject* self, PyObject*) { return make(held(self)); }

void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  held(object).~Options();
  type->tp_free(object);
  Py_DECREF(type);
}

// Python calls this function, so no exception may leave it.
int set(PyObject* self, PyObject* value, void* closure) {
  const Field& field = *static_cast<const Field*>(closure);
  try {
    if (value && field.set(held(self), value)) return 0;
    PyErr_Format(PyExc_TypeError, "Options: %s cannot be %R", field.name, value ? value : Py_None);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return -1;
}

PyObject* get(PyObject* self, void* field) { return static_cast<const Field*>(field)->get(held(self)); }

py::dict codes(std::span<const char* const> words) {
  py::dict d;
  for (std::size_t code = 0; code < words.size(); ++code) d[words[code]] = code;
  return d;
}

}  // namespace

const Options& options_of(py::handle object) {
  if (Py_TYPE(object.ptr()) != options_type) throw py::type_error("_core: an Options is needed");
  return held(object.ptr());
}

AttentionArguments arguments_of(const char* function, const Options& options, const TensorView& q, const TensorView& k,
                                const TensorView& v) {
  AttentionArguments a;
  static_cast<Settings&>(a) = options;
  a.function = function;
  a.q = q;
  a.k = k;
  a.v = v;
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
  static PyGetSetDef attributes[count + 1] = {};
  for (std::size_t i = 0; i < count; ++i)
    attributes[i] = {fields[i].name, &get, &set, nullptr, const_cast<Field*>(&fields[i])};
  static PyMethodDef methods[] = {{"copy", &copy, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                         {Py_tp_getset, attributes},
                         {Py_tp_methods, methods},
                         {0, nullptr}};
  PyType_Spec spec = {"selfattn._core.Options", sizeof(OptionsObject), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, slots};
  const auto type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  options_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  options_type->tp_vectorcall = &construct;  // the only constructor
  Py_INCREF(options_type);
  module.attr("Options") = type;
  module.attr("LAYOUTS") = codes(layout_words);
  module.attr("PRECISIONS") = codes(precision_words);
  module.attr("DTYPES") = codes(dtype_words);
}

}  // namespace selfattn::bindings
