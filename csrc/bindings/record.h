// Python types for the arguments of the core: each wraps a C++ struct, whose fields have names and types in Python too.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <type_traits>

namespace selfattn::bindings {

namespace py = pybind11;

// Conversions of a field's value. `read` returns whether the field accepts the value; if not, it does not change `to`.
inline bool read(PyObject* value, bool& to) {
  if (!PyBool_Check(value)) return false;
  to = value == Py_True;
  return true;
}

inline bool read(PyObject* value, double& to) {
  if (!PyFloat_Check(value)) return false;
  to = PyFloat_AS_DOUBLE(value);
  return true;
}

inline bool read(PyObject* value, std::int64_t& to) {
  if (!PyLong_Check(value)) return false;
  int overflow = 0;
  const std::int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow != 0) return false;
  to = number;
  return true;
}

inline bool read(PyObject* value, std::uint64_t& to) {
  if (!PyLong_Check(value)) return false;
  const std::uint64_t number = PyLong_AsUnsignedLongLong(value);
  if (PyErr_Occurred()) {  // negative or too large
    PyErr_Clear();
    return false;
  }
  to = number;
  return true;
}

inline bool read(PyObject* value, std::optional<double>& to) {
  double number = 0;
  if (value != Py_None && !read(value, number)) return false;
  to = value == Py_None ? std::nullopt : std::optional(number);
  return true;
}

// An integer from 0 to count - 1.
template <class T>
bool read_below(std::int64_t count, PyObject* value, T& to) {
  std::int64_t number = 0;
  if (!read(value, number) || number < 0 || number >= count) return false;
  to = static_cast<T>(number);
  return true;
}

inline bool read(PyObject* value, int& to) { return read_below(1 << 30, value, to); }

// The number of values of an enumeration. The values are 0, 1, ...
template <class Enum>
inline constexpr std::int64_t enum_count = 0;

template <class Enum>
  requires std::is_enum_v<Enum>
bool read(PyObject* value, Enum& to) {
  return read_below(enum_count<Enum>, value, to);
}

// The value of an enumeration with the number of a Python integer. Throws TypeError for anything else.
template <class Enum>
Enum enum_of(py::handle value) {
  Enum found{};
  if (!read(value.ptr(), found))
    throw py::type_error("_core: " + std::string(py::repr(value)) + " is not the number of a choice");
  return found;
}

// Accepts any object. The binding checks the object's type where it uses the object.
inline bool read(PyObject* value, py::object& to) {
  to = py::reinterpret_borrow<py::object>(value);
  return true;
}

inline PyObject* written(bool value) { return PyBool_FromLong(value); }
inline PyObject* written(double value) { return PyFloat_FromDouble(value); }
inline PyObject* written(int value) { return PyLong_FromLong(value); }
inline PyObject* written(std::int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* written(std::uint64_t value) { return PyLong_FromUnsignedLongLong(value); }
inline PyObject* written(const py::object& value) { return Py_NewRef(value.ptr()); }
inline PyObject* written(const std::optional<double>& value) { return value ? written(*value) : Py_NewRef(Py_None); }
template <class Enum>
  requires std::is_enum_v<Enum>
PyObject* written(Enum value) {
  return PyLong_FromLong(static_cast<long>(value));
}

// One field of a T.
template <class T>
struct Field {
  const char* name;
  bool (*set)(T& record, PyObject* value);
  PyObject* (*get)(const T& record);
};

template <class T, auto member>
constexpr Field<T> field(const char* name) {
  return {name, [](T& record, PyObject* value) { return read(value, record.*member); },
          [](const T& record) { return written(record.*member); }};
}

// The Python type of T. Its objects are made from keyword arguments; fields that are not given keep the defaults of T.
// The type is not a pybind11 class: pybind11 registers each object, which is slower and terminates the process if
// memory runs out.
template <class T>
class Record {
 public:
  // `fields` must outlive the module.
  template <std::size_t count>
  static void add(py::module_& module, const char* name, const Field<T> (&fields)[count]) {
    static PyGetSetDef attributes[count + 1] = {};
    static PyObject* names[count];
    for (std::size_t i = 0; i < count; ++i) {
      attributes[i] = {fields[i].name, &get, &set, nullptr, const_cast<Field<T>*>(&fields[i])};
      names[i] = PyUnicode_InternFromString(fields[i].name);
      if (!names[i]) throw py::error_already_set();
    }
    static PyMethodDef methods[] = {{"copy", &copy, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
    PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                           {Py_tp_getset, attributes},
                           {Py_tp_methods, methods},
                           {0, nullptr}};
    static const std::string full_name = std::string("selfattn._core.") + name;
    PyType_Spec spec = {full_name.c_str(), sizeof(Object), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, slots};
    const auto made = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
    if (!made) throw py::error_already_set();
    name_ = name;
    fields_ = fields;
    names_ = names;
    count_ = count;
    type_ = reinterpret_cast<PyTypeObject*>(made.ptr());
    type_->tp_vectorcall = &construct;  // the only constructor
    Py_INCREF(type_);
    module.attr(name) = made;
  }

  // The T in an object. Throws TypeError for an object of another type.
  static T& in(py::handle object) {
    if (Py_TYPE(object.ptr()) != type_)
      throw py::type_error(std::string("_core: an object of type ") + name_ + " is needed");
    return held(object.ptr());
  }

 private:
  struct Object {
    PyObject_HEAD T held;
  };

  static T& held(PyObject* object) { return reinterpret_cast<Object*>(object)->held; }

  static PyObject* make(const T& from) {
    PyObject* object = type_->tp_alloc(type_, 0);
    if (object) ::new (&held(object)) T(from);
    return object;
  }

  static PyObject* copy(PyObject* self, PyObject*) { return make(held(self)); }

  static const Field<T>* named(PyObject* name) {
    for (std::size_t i = 0; i < count_; ++i)
      if (names_[i] == name) return fields_ + i;  // usually found here: Python interns the names in source code
    for (std::size_t i = 0; i < count_; ++i)
      if (PyUnicode_CompareWithASCIIString(name, fields_[i].name) == 0) return fields_ + i;
    return nullptr;
  }

  static PyObject* construct(PyObject*, PyObject* const* arguments, std::size_t given, PyObject* keywords) {
    if (PyVectorcall_NARGS(given) != 0) {
      PyErr_Format(PyExc_TypeError, "%s() takes keyword arguments only", name_);
      return nullptr;
    }
    PyObject* object = make(T());
    const Py_ssize_t count = object && keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* name = PyTuple_GET_ITEM(keywords, i);
      const Field<T>* field = named(name);
      if (!field) PyErr_Format(PyExc_TypeError, "%s() has no argument %R", name_, name);
      if (field && set(object, arguments[i], const_cast<Field<T>*>(field)) == 0) continue;
      Py_DECREF(object);
      return nullptr;
    }
    return object;
  }

  static void destroy(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    held(object).~T();
    type->tp_free(object);
    Py_DECREF(type);
  }

  // Python calls this function, so no exception may leave it.
  static int set(PyObject* self, PyObject* value, void* closure) {
    const Field<T>& field = *static_cast<const Field<T>*>(closure);
    try {
      if (value && field.set(held(self), value)) return 0;
      PyErr_Format(PyExc_TypeError, "%s: %s cannot be %R", name_, field.name, value ? value : Py_None);
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    }
    return -1;
  }

  static PyObject* get(PyObject* self, void* field) { return static_cast<const Field<T>*>(field)->get(held(self)); }

  static inline PyTypeObject* type_ = nullptr;
  static inline const char* name_ = nullptr;
  static inline const Field<T>* fields_ = nullptr;
  static inline PyObject* const* names_ = nullptr;  // of the fields, interned
  static inline std::size_t count_ = 0;
};

}  // namespace selfattn::bindings
