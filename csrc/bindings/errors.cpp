// Translates the core's refusals (message.h) to Python exceptions, with the parts of their messages.
#include <exception>

#include "bindings/attention.h"
#include "message.h"

namespace selfattn::bindings {
namespace {

// Nothing here throws, because pybind11 would then translate the refusal as a plain std::invalid_argument. If memory
// runs out, the results are null and Python's error is MemoryError.
py::object text_of(const char* text) { return py::reinterpret_steal<py::object>(PyUnicode_FromString(text)); }

py::object parts_of(const Message& message) {
  auto parts = py::reinterpret_steal<py::object>(PyTuple_New(static_cast<Py_ssize_t>(message.size())));
  for (std::size_t i = 0; parts && i < message.size(); ++i) {
    py::object part = text_of(message[i].c_str());
    if (!part) return part;
    PyTuple_SET_ITEM(parts.ptr(), static_cast<Py_ssize_t>(i), part.release().ptr());
  }
  return parts;
}

void set_error(PyObject* type, const Refusal& refusal) {
  const py::object text = text_of(refusal.what());
  if (!text) return;
  const auto error = py::reinterpret_steal<py::object>(PyObject_CallOneArg(type, text.ptr()));
  if (!error) return;
  const py::object parts = parts_of(refusal.message());
  if (parts && PyObject_SetAttrString(error.ptr(), "message_parts", parts.ptr()) == 0)
    PyErr_SetObject(type, error.ptr());
}

}  // namespace

void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr exception) {
    try {
      std::rethrow_exception(std::move(exception));
    } catch (const TypeRefusal& refusal) {
      set_error(PyExc_TypeError, refusal);
    } catch (const MemoryRefusal& refusal) {
      set_error(PyExc_MemoryError, refusal);
    } catch (const Refusal& refusal) {
      set_error(PyExc_ValueError, refusal);
    }
  });
}

}  // namespace selfattn::bindings
