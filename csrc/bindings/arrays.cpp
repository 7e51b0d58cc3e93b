#include "bindings/arrays.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "message.h"

namespace selfattn::bindings {
namespace {

static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t), "NumPy's shapes are viewed as int64");

constexpr int bool_number = 0, float_number = 11, double_number = 12, half_number = 23;  // NPY_BOOL, NPY_FLOAT, ...
constexpr int structure_number = 20, first_user_number = 256;                            // NPY_VOID, NPY_USERDEF

// For a structure with one field, returns the field's name. The Python layer holds bfloat16 in such a structure if no
// package defines the type, and names the field bfloat16.
std::string dtype_name(const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.num() != structure_number) return py::str(dtype.attr("name"));
  const py::object fields = dtype.attr("names");
  return !fields.is_none() && py::len(fields) == 1 ? py::str(fields[py::int_(0)]) : py::str(dtype.attr("name"));
}

template <class... Rule>
[[noreturn]] void refuse_type(const char* function, const char* name, const std::string& got, const Rule&... rule) {
  refuse<TypeRefusal>(function, Argument{name}, " has dtype ", got, ", but ", rule...);
}

// The Python layer converts arguments to ndarrays. An object of another type would crash the process.
py::array as_array(py::handle object) {
  if (!py::isinstance<py::array>(object)) throw py::type_error("the core takes only arrays of NumPy");
  return py::reinterpret_borrow<py::array>(object);
}

py::array named_array(const char* function, const char* name, py::handle object) {
  if (py::isinstance<py::array>(object)) return py::reinterpret_borrow<py::array>(object);
  refuse<TypeRefusal>(function, Argument{name}, " is of type ", Py_TYPE(object.ptr())->tp_name,
                      ", but an array is needed");
}

// NumPy itself has no type number for bfloat16. The type is recognised by its name, without importing the package that
// defines it. Looking up a name is slow, so the type's number is kept; it does not change while the process runs.
bool is_bfloat(const py::array& array, int number) {
  static std::atomic<int> known{first_user_number - 1};  // no type has this number
  if (number == known.load(std::memory_order_relaxed)) return true;
  const bool structure = number == structure_number;
  if ((number < first_user_number && !structure) || array.itemsize() != narrow_size || dtype_name(array) != "bfloat16")
    return false;
  if (!structure) known.store(number, std::memory_order_relaxed);
  return true;
}

std::optional<DType> float_type(const py::array& array) {
  const int number = array.dtype().num();
  switch (number) {
    case float_number:
      return DType::f32;
    case double_number:
      return DType::f64;
    case half_number:
      return DType::f16;
    default:
      return is_bfloat(array, number) ? std::optional(DType::bf16) : std::nullopt;
  }
}

}  // namespace

TensorView view_of(const py::array& array, DType dtype) {
  TensorView view;
  view.data = const_cast<void*>(array.data());
  view.dtype = dtype;
  view.ndim = static_cast<int>(array.ndim());
  view.shape = reinterpret_cast<const std::int64_t*>(array.shape());
  view.strides = reinterpret_cast<const std::int64_t*>(array.strides());
  return view;
}

Shape shape_of(const TensorView& view) {
  Shape shape;
  for (int axis = 0; axis < view.ndim; ++axis) shape.append(view.shape[axis]);
  return shape;
}

TensorView float_view(const char* function, const char* name, py::handle object) {
  const py::array array = named_array(function, name, object);
  if (const std::optional<DType> dtype = float_type(array)) return view_of(array, *dtype);
  refuse_type(function, name, dtype_name(array),
              "float16, bfloat16, float32 and float64 are accepted: convert it with .astype(numpy.float32)");
}

TensorView matching_view(const char* function, const char* name, py::handle object, const char* like_name, DType like) {
  const TensorView view = float_view(function, name, object);
  if (view.dtype != like)
    refuse_type(function, name, dtype_name(as_array(object)), Argument{like_name}, " has ", name_of(like),
                ": they must agree, convert one with .astype");
  return view;
}

TensorView bool_view(const char* function, const char* name, py::handle object) {
  if (object.is_none()) return {};
  const py::array array = named_array(function, name, object);
  if (array.dtype().num() != bool_number)
    refuse_type(function, name, dtype_name(array),
                "a mask must be bool, with True where to attend: if 1 means attend, pass `array != 0`; pass numbers "
                "that are to be added to scores as ",
                "bias"_arg);
  return view_of(array, DType::boolean);
}

TensorView optional_view(py::handle object, DType dtype) {
  return object.is_none() ? TensorView{} : view_of(as_array(object), dtype);
}

TensorView code_view(py::handle object) {
  const py::array array = as_array(object);
  const std::string name = dtype_name(array);
  for (int i = 0; i < stored_count; ++i) {
    const auto dtype = static_cast<DType>(i);
    if (is_scaled(dtype) && !shares_words(dtype) && name == element_type(dtype).memory) return view_of(array, dtype);
  }
  throw py::type_error("the core takes only arrays of codes");
}

py::array new_array(const Shape& shape, DType dtype, py::handle like) {
  const std::vector<py::ssize_t> extents(shape.extent, shape.extent + shape.ndim);
  if (is_narrow(dtype)) return py::array(as_array(like).dtype(), extents);
  return with_type(dtype, [&]<class T> { return py::array(py::dtype::of<T>(), extents); });
}

namespace {

struct Bytes {
  std::uintptr_t begin, end;
};

Bytes bytes_of(const TensorView& view) {
  const auto start = reinterpret_cast<std::uintptr_t>(view.data);
  std::int64_t below = 0, above = size_of(view.dtype);
  for (int axis = 0; axis < view.ndim; ++axis) {
    if (view.shape[axis] == 0) return {start, start};
    const std::int64_t reach = (view.shape[axis] - 1) * view.strides[axis];
    (reach < 0 ? below : above) += reach;
  }
  return {start + static_cast<std::uintptr_t>(below), start + static_cast<std::uintptr_t>(above)};
}

}  // namespace

bool meet(const TensorView& a, const TensorView& b) {
  if (!a || !b) return false;
  const Bytes x = bytes_of(a), y = bytes_of(b);
  return x.begin < y.end && y.begin < x.end;
}

void check_own_memory(const char* function, const char* name, const char* part, const py::array& array) {
  struct Axis {
    std::int64_t stride, extent;
    int number;
  };
  Axis axes[max_axes];
  int count = 0;
  for (int axis = 0; axis < array.ndim(); ++axis) {
    if (array.shape(axis) == 0) return;
    if (array.shape(axis) > 1) axes[count++] = {std::abs(array.strides(axis)), array.shape(axis), axis};
  }
  std::sort(axes, axes + count, [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  std::int64_t filled = array.itemsize();  // bytes that the axes up to here span
  for (int i = 0; i < count; ++i) {
    if (axes[i].stride < filled)
      refuse(function, Argument{name}, part, " has stride ", axes[i].stride, " along axis ", axes[i].number,
             ", so that its elements share memory");
    filled += (axes[i].extent - 1) * axes[i].stride;
  }
}

void check_out(const char* function, const py::array& out, const Shape& shape, DType dtype) {
  const char order = out.dtype().byteorder();
  if (float_type(out) != dtype || order == '>' || order == '<')
    refuse_type(function, "out", dtype_name(out) + (order == '=' || order == '|' ? "" : " of foreign byte order"),
                "the result is ", name_of(dtype));
  const TensorView view = view_of(out, dtype);
  if (view.ndim != shape.ndim || !std::equal(shape.extent, shape.extent + shape.ndim, view.shape))
    refuse(function, "out"_arg, " has shape ", shape_text(view), " but the result has ",
           to_text(shape.extent, shape.ndim));
  if (!out.writeable()) refuse(function, "out"_arg, " is read-only");
  check_own_memory(function, "out", "", out);
}

bool interrupted() {
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

}  // namespace selfattn::bindings
