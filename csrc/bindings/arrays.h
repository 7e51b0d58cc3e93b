// Conversions between py::array and TensorView, and checks of arrays.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "problem.h"
#include "task_loop.h"
#include "tensor_view.h"

namespace selfattn::bindings {

namespace py = pybind11;

// Views of arrays, which the Python layer has already converted to ndarrays of native byte order. A wrong dtype throws
// TypeError; the message names the function, the argument, its dtype and what is accepted.
TensorView float_view(const char* function, const char* name, py::handle array);
TensorView bool_view(const char* function, const char* name, py::handle array);

// None gives an absent view. The Python layer has already converted the argument to `dtype`.
TensorView optional_view(py::handle array, DType dtype);

// A view of codes that do not share words; the Python layer has checked their dtype.
TensorView code_view(py::handle array);

// The view of an array whose dtype must be `like`, the dtype of the argument `like_name`.
TensorView matching_view(const char* function, const char* name, py::handle array, const char* like_name, DType like);

// Allocates an array. For 16-bit types, its NumPy dtype is the dtype of `like`, because bfloat16 is defined by another
// package.
py::array new_array(const Shape& shape, DType dtype, py::handle like = py::none());
TensorView view_of(const py::array& array, DType dtype);
Shape shape_of(const TensorView& view);

// Whether two arrays may share memory: their ranges of bytes, from the first to the last, overlap.
bool meet(const TensorView& a, const TensorView& b);
// Checks an `out` argument: shape, dtype, writeable, no overlapping elements.
void check_out(const char* function, const py::array& out, const Shape& shape, DType dtype);
// Throws std::invalid_argument if elements of an array share memory, as in a broadcast array. The message calls the
// array `name`, followed by `part`.
void check_own_memory(const char* function, const char* name, const char* part, const py::array& array);

// Takes the GIL, runs pending signal handlers and returns whether one raised. The exception stays set.
bool interrupted();

// The scope of a call in which the core computes. Releases the GIL if the work is long enough to be worth it.
class CoreCall {
 public:
  explicit CoreCall(double flops) {
    if (flops > 2e5) release_.emplace();
  }
  ~CoreCall() { note_end_of_call(); }
  CoreCall(const CoreCall&) = delete;
  CoreCall& operator=(const CoreCall&) = delete;

 private:
  std::optional<py::gil_scoped_release> release_;
};

}  // namespace selfattn::bindings
