// py::array <-> TensorView.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "problem.h"
#include "task_loop.h"
#include "tensor_view.h"

namespace selfattn::bindings {

namespace py = pybind11;

// Views of arrays that Python's layer has already made ndarrays of native byte order. Each throws TypeError naming
// the function, the argument, what it got and what is accepted.
TensorView float_view(const char* function, const char* name, py::handle array);
TensorView bool_view(const char* function, const char* name, py::handle array);

// None gives an absent view. The dtype was settled when Python's layer converted the argument.
TensorView optional_view(py::handle array, DType dtype);

// The view of an array that must have the same dtype as `like`, whose argument is called `like_name`.
TensorView matching_view(const char* function, const char* name, py::handle array, const char* like_name, DType like);

// The name that users know the dtype of numbers by.
const char* name_of(DType dtype);

// bfloat16 is a type of another package's: its description is taken from an array that has it.
py::array new_array(const Shape& shape, DType dtype, py::handle like = py::none());
TensorView view_of(const py::array& array, DType dtype);

// Whether some element of one may share memory with one of the other: their first to last bytes meet.
bool meet(const TensorView& a, const TensorView& b);
// Refuses an `out` whose elements share memory with each other.
void check_own_memory(const char* function, const TensorView& out);
// Checks an `out` argument: shape, dtype, writeable, no two elements in one place.
void check_out(const char* function, const py::array& out, const Shape& shape, DType dtype);

// Asks Python whether a signal handler raised; takes the GIL for it. The exception stays set.
bool interrupted();

// The time in which the core works for a call: without the GIL where that is long enough to be worth the switch.
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
