// The core's part of Linear, FeedForward and the norms.
#include "bindings/linear.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <utility>

#include "bindings/attention.h"
#include "bindings/cache_arguments.h"
#include "bindings/options.h"
#include "message.h"
#include "registry.h"

namespace selfattn::bindings {

// The names by which users choose an activation, in the order of the core's enum.
constexpr const char* activation_names[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
static_assert(std::size(activation_names) == static_cast<std::size_t>(Activation::silu) + 1);
template <>
inline constexpr std::int64_t enum_count<Activation> = std::size(activation_names);

HeldNorm::HeldNorm(const NormForm& form)
    : weight(form.weight), bias(form.bias), norm{data_of(weight), data_of(bias), form.epsilon, form.centred} {}

const char* HeldNorm::data_of(py::handle vector) {
  return vector.is_none() ? nullptr : static_cast<const char*>(py::reinterpret_borrow<py::array>(vector).data());
}

const Norm* norm_or_none(py::handle capsule) { return capsule.is_none() ? nullptr : &held_by<HeldNorm>(capsule).norm; }

bool same(const TensorView& a, const TensorView& b) {
  return a.data == b.data && a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape) &&
         std::equal(a.strides, a.strides + a.ndim, b.strides);
}

TensorView residual_view(const char* function, py::handle array, DType dtype, const Shape& shape) {
  if (array.is_none()) return {};
  const TensorView view = matching_view(function, "residual", array, "x", dtype);
  if (view.ndim != shape.ndim || !std::equal(shape.extent, shape.extent + shape.ndim, view.shape))
    refuse(function, "residual"_arg, " has shape ", shape_text(view), " but the result has ",
           to_text(shape.extent, shape.ndim));
  return view;
}

namespace {

// An array with axes (..., columns) as rows: a vector is one row.
struct ArrayRows {
  explicit ArrayRows(const TensorView& array) : view(array) {
    if (array.ndim != 1) return;
    shape[1] = array.shape[0];
    strides[1] = array.strides[0];
    view.ndim = 2;
    view.shape = shape;
    view.strides = strides;
  }
  ArrayRows(const ArrayRows&) = delete;  // the view points into this object
  ArrayRows& operator=(const ArrayRows&) = delete;
  RowsView rows() const { return RowsView(view); }

  std::int64_t shape[2] = {1, 0}, strides[2] = {0, 0};
  TensorView view;
};

// A call that maps rows of x to rows of out.
struct RowCall {
  const char* function;
  TensorView x, residual;
  Shape shape;  // of the result

  // Checks that x has `depth` columns, and that the residual is None or has the shape of the result.
  RowCall(const char* function, py::handle x_array, std::int64_t depth, py::handle residual_array, std::int64_t columns)
      : function(function), x(float_view(function, "x", x_array)) {
    if (x.ndim < 1 || x.ndim >= max_axes)
      refuse(function, "x"_arg, " has shape ", shape_text(x), ", but (..., ", depth, ") is needed");
    if (x.extent(0) != depth) refuse(function, "x"_arg, " has ", x.extent(0), " columns, but ", depth, " are needed");
    for (int axis = 0; axis + 1 < x.ndim; ++axis) shape.append(x.shape[axis]);
    shape.append(columns);
    residual = residual_view(function, residual_array, x.dtype, shape);
  }

  // Calls work(make(x, residual or null, out)), which returns false if interrupted. `in_place`: out may be x itself.
  template <class Make, class Work>
  py::object run(py::object out, py::handle like, bool in_place, Make make, Work work) const {
    bool direct = false;
    if (!out.is_none()) {
      const py::array given = py::reinterpret_borrow<py::array>(out);
      check_out(function, given, shape, x.dtype);
      const TensorView view = view_of(given, x.dtype);
      direct = (given.flags() & py::array::c_style) != 0 && (!meet(view, x) || (in_place && same(view, x))) &&
               (!meet(view, residual) || same(view, residual));
    }
    Destination result(std::move(out), direct, shape, x.dtype, like);
    const ArrayRows rows(x), added(residual ? residual : x);
    const RowsView added_rows = added.rows();
    bool finished = true;
    if (result.array.size() > 0) {
      const auto job =
          make(rows.rows(), residual ? &added_rows : nullptr, static_cast<char*>(result.view(x.dtype).data));
      const CoreCall call_of_core(flops(job));
      finished = work(job);
    }
    if (!finished) throw py::error_already_set();
    return result.deliver();
  }
};

// A matrix and its bias. The matrix holds numbers if `scales` is None, otherwise codes. The Python layer has checked
// them.
struct Matrix {
  py::handle matrix, scales, bias;

  // Projection::digits_for
  int digits_for(Precision precision) const {
    if (scales.is_none()) return 0;
    const std::int64_t rows = code_view(matrix).shape[0], groups = optional_view(scales, DType::f32).shape[0];
    return Projection::digits_for(active_kernels(), precision, rows / groups);
  }
  Projection packed(int digits) const {
    const TensorView added = bias.is_none() ? TensorView{} : float_view("Linear", "b", bias);
    if (scales.is_none()) return Projection(active_kernels(), float_view("Linear", "w", matrix), added);
    return Projection(active_kernels(), code_view(matrix), added, optional_view(scales, DType::f32), digits);
  }
};

struct HeldLinear {
  static constexpr const char* capsule_name = "selfattn.Linear";

  const LinearWeights weights;
};

// Checks that x has a type that can be multiplied by the type of the weights.
void check_dtype(const char* function, const TensorView& x, const Projection& projection) {
  const DType weights = projection.dtype();
  const bool codes = is_scaled(weights);
  if (x.dtype != weights && computed_in(weights) != (codes ? computed_in(x.dtype) : x.dtype))
    refuse<TypeRefusal>(function, "x"_arg, " has dtype ", name_of(x.dtype), " but the weights have ", name_of(weights),
                        codes                ? ": x must be float32, float16 or bfloat16"
                        : is_narrow(weights) ? ": x must have their dtype or float32"
                                             : ": x must have their dtype");
}

// The precision counts for codes only.
py::capsule make_linear(py::handle weights, py::handle activation, py::handle precision) {
  const UnpackedLinear& from = Record<UnpackedLinear>::in(weights);
  const Matrix matrix{from.w, from.scales, from.b}, gate_matrix{from.w_gate, from.gate_scales, from.b_gate};
  const Precision wanted = enum_of<Precision>(precision);
  std::optional<Projection> gate;
  int digits = matrix.digits_for(wanted);
  if (!from.w_gate.is_none()) {  // both matrices read the same digits, or the same numbers
    digits = std::min(digits, gate_matrix.digits_for(wanted));
    gate.emplace(gate_matrix.packed(digits));
  }
  return capsule_of(std::unique_ptr<HeldLinear>(
      new HeldLinear{{matrix.packed(digits), std::move(gate), enum_of<Activation>(activation)}}));
}

py::object call_linear(const py::capsule& capsule, const char* function, py::handle x, py::handle residual,
                       py::object out, int num_threads) {
  const LinearWeights& layer = held_by<HeldLinear>(capsule).weights;
  const Projection& projection = layer.projection;
  const RowCall call(function, x, projection.depth(), residual, projection.columns());
  check_dtype(function, call.x, projection);
  const auto job = [&](const RowsView& rows, const RowsView* added, char* result) {
    const DType dtype = call.x.dtype;
    return LinearJob{projection,
                     rows,
                     result,
                     dtype,
                     projection.columns() * size_of(dtype),
                     nullptr,
                     layer.gate ? &*layer.gate : nullptr,
                     layer.activation,
                     added};
  };
  return call.run(std::move(out), x, false, job,
                  [&](const LinearJob& all) { return run_all(&all, 1, num_threads, interrupted); });
}

const char* linear_isa(const py::capsule& capsule) {
  return held_by<HeldLinear>(capsule).weights.projection.kernels().name;
}

// Fills a matrix and, if it holds codes, their scales. Returns the bias as an array, or None.
py::object unpack_with_scales(const Projection& projection, py::handle matrix, py::handle scales) {
  if (is_scaled(projection.dtype())) {
    float* to = static_cast<float*>(py::reinterpret_borrow<py::array>(scales).mutable_data());
    for (std::int64_t group = 0; group < projection.groups(); ++group, to += projection.columns())
      std::copy_n(projection.scales(group), projection.columns(), to);
  }
  return unpack(projection, view_of(py::reinterpret_borrow<py::array>(matrix), projection.dtype()));
}

// Fills the matrices and scales, and sets the biases. w_gate and b_gate are used only if the layer has a gate.
void unpack_linear(const py::capsule& capsule, py::handle weights) {
  const LinearWeights& layer = held_by<HeldLinear>(capsule).weights;
  UnpackedLinear& to = Record<UnpackedLinear>::in(weights);
  to.b = unpack_with_scales(layer.projection, to.w, to.scales);
  if (layer.gate) to.b_gate = unpack_with_scales(*layer.gate, to.w_gate, to.gate_scales);
}

// The caller must neither change nor release `weights`, a _core.FeedForwardWeights.
py::object call_feed_forward(py::handle weights, const char* function, py::handle x, py::handle residual,
                             py::object out, int num_threads) {
  const FeedForwardWeights& capsules = Record<FeedForwardWeights>::in(weights);
  const LinearWeights& first = held_by<HeldLinear>(capsules.first).weights;
  const LinearWeights& second = held_by<HeldLinear>(capsules.second).weights;
  const RowCall call(function, x, first.projection.depth(), residual, second.projection.columns());
  check_dtype(function, call.x, first.projection);
  // Read here, because the work runs without the GIL.
  const Norm *const norm = norm_or_none(capsules.norm), *const post_norm = norm_or_none(capsules.post_norm);
  const auto job = [&](const RowsView& rows, const RowsView* added, char* result) {
    return FeedForward({first, second, norm, post_norm, rows, added, result, call.x.dtype});
  };
  return call.run(std::move(out), x, true, job,
                  [&](const FeedForward& all) { return all.run(num_threads, interrupted); });
}

py::capsule make_norm(py::handle form) { return capsule_of(std::make_unique<HeldNorm>(Record<NormForm>::in(form))); }

// Not by a capsule of make_norm(), whose memory would be allocated in every call.
py::object normalise(py::handle form, const char* function, py::handle x, py::handle residual, py::object out) {
  const HeldNorm held(Record<NormForm>::in(form));
  const Norm& norm = held.norm;
  const TensorView view = float_view(function, "x", x);
  const std::int64_t count = view.ndim > 0 ? view.extent(0) : 0;
  const RowCall call(function, x, count, residual, count);
  const auto job = [&](const RowsView& rows, const RowsView* added, char* result) {
    const DType dtype = call.x.dtype;
    return NormJob{active_kernels(), norm, count, rows, added, result, dtype, count * size_of(dtype)};
  };
  return call.run(std::move(out), x, true, job, [](const NormJob& all) { return normalise_all(all, 0, interrupted); });
}

}  // namespace

py::object unpack(const Projection& projection, const TensorView& weights) {
  projection.unpack(weights);
  if (!projection.bias()) return py::none();
  Shape shape;
  shape.append(projection.columns());
  py::array bias = new_array(shape, projection.computation());
  std::memcpy(bias.mutable_data(), projection.bias(), static_cast<std::size_t>(bias.nbytes()));
  return bias;
}

void register_linear(py::module_& module) {
  module.attr("ACTIVATIONS") = numbers_of(activation_names);
  module.def("make_linear", &make_linear);
  module.def("call_linear", &call_linear);
  module.def("linear_isa", &linear_isa);
  module.def("unpack_linear", &unpack_linear);
  module.def("call_feed_forward", &call_feed_forward);
  module.def("make_norm", &make_norm);
  module.def("normalise", &normalise);
}

}  // namespace selfattn::bindings
