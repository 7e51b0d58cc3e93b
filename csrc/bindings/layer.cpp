// What SelfAttention holds of the core, and apply_rope.
#include "layer.h"

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/attention.h"
#include "bindings/cache_arguments.h"
#include "message.h"
#include "parallel.h"
#include "registry.h"
#include "rope.h"

namespace selfattn::bindings {

std::optional<Rope> rope_of(py::handle description) {
  if (description.is_none()) return std::nullopt;
  const py::tuple t = py::reinterpret_borrow<py::tuple>(description);
  return Rope{t[0].cast<double>(), t[1].cast<std::int64_t>(), t[2].cast<bool>()};
}

namespace {

class Layer {
 public:
  // Arrays of one dtype whose shapes Python's layer has checked; biases, w_o and rope may be None.
  Layer(py::handle w_q, py::handle w_k, py::handle w_v, py::handle w_o, const py::tuple& biases, std::int64_t num_heads,
        std::int64_t num_kv_heads, py::handle rope)
      : weights_(make(w_q, w_k, w_v, w_o, biases, num_heads, num_kv_heads, rope)) {}

  // inputs: x, context or None, positions or None, a cache's tuple or None.
  py::object call(const char* function, const py::tuple& inputs, py::object out, const py::tuple& option_values) const {
    const py::handle x = inputs[0], context = inputs[1];
    const Options options(option_values);
    const TensorView input = input_view(function, "x", x, weights_.query.depth());
    const TensorView other =
        context.is_none() ? TensorView{} : input_view(function, "context", context, weights_.key.depth());
    const TensorView places = optional_view(inputs[2], DType::i64);
    std::optional<CacheArguments> source;
    open_cache(source, function, inputs[3], input);
    const AttentionArguments arguments = arguments_of(function, options, {}, {}, {});
    LayerCall call(weights_, input, other, places, source ? &source->cache() : nullptr, arguments);
    bool direct = false;
    if (!out.is_none()) {
      const py::array given = py::reinterpret_borrow<py::array>(out);
      check_out(function, given, call.out_shape(), weights_.dtype);
      const TensorView view = view_of(given, weights_.dtype);
      direct = (given.flags() & py::array::c_style) != 0 && !meet(view, input) && !meet(view, other) &&
               !meet(view, places) && !meets_any(view, arguments) && !(source && source->meets(view));
    }
    Destination result(std::move(out), direct, call.out_shape(), weights_.dtype, x);
    const Extras extras(options, call.problem());
    if (source) source->claim();
    bool finished;
    {
      const CoreCall call_of_core(call.flops());
      finished = call.run(result.view(weights_.dtype), options.num_threads, interrupted);
    }
    if (!finished) throw py::error_already_set();
    py::object results = extras.join(result.deliver());
    if (source) source->commit();  // last: nothing can fail any more
    return results;
  }

  const char* isa() const { return weights_.kernels->name; }

  // Fills the matrices w_q, w_k, w_v and, where there is one, w_o; returns the biases or None, and whether it is there.
  py::tuple unpack(const py::tuple& matrices) const {
    const Projection* const projections[] = {&weights_.query, &weights_.key, &weights_.value,
                                             weights_.output ? &*weights_.output : nullptr};
    py::tuple found(5);
    for (std::size_t i = 0; i < 4; ++i) {
      found[i] = py::none();
      if (!projections[i]) continue;
      const Projection& projection = *projections[i];
      projection.unpack(view_of(py::reinterpret_borrow<py::array>(matrices[i]), weights_.dtype));
      if (!projection.bias()) continue;
      Shape shape;
      shape.append(projection.columns());
      py::array bias = new_array(shape, projection.computation());
      std::memcpy(bias.mutable_data(), projection.bias(), static_cast<std::size_t>(bias.nbytes()));
      found[i] = std::move(bias);
    }
    found[4] = py::bool_(projections[3] != nullptr);
    return found;
  }

 private:
  static LayerWeights make(py::handle w_q, py::handle w_k, py::handle w_v, py::handle w_o, const py::tuple& biases,
                           std::int64_t num_heads, std::int64_t num_kv_heads, py::handle rope) {
    const KernelSet& kernels = active_kernels();
    const DType dtype = float_view("SelfAttention", "w_q", w_q).dtype;
    const auto projection = [&](py::handle weights, std::size_t bias) {
      return Projection(kernels, optional_view(weights, dtype), optional_view(biases[bias], dtype));
    };
    const auto columns = [](py::handle w) { return py::reinterpret_borrow<py::array>(w).shape(1); };
    LayerWeights layer{&kernels,
                       dtype,
                       num_heads,
                       num_kv_heads,
                       columns(w_q) / num_heads,
                       columns(w_v) / num_kv_heads,
                       projection(w_q, 0),
                       projection(w_k, 1),
                       projection(w_v, 2),
                       std::nullopt,
                       rope_of(rope)};
    if (!w_o.is_none()) layer.output.emplace(projection(w_o, 3));
    return layer;
  }

  void open_cache(std::optional<CacheArguments>& found, const char* function, py::handle values,
                  const TensorView& x) const {
    if (values.is_none()) return;
    if (x.ndim != 3) refuse(function, "x has shape ", shape_text(x), ", but a cache needs (batch, tokens, d_model)");
    found.emplace(function, py::reinterpret_borrow<py::tuple>(values), x.extent(1));
    const Cache& cache = found->cache();
    if (x.extent(2) != cache.batch)
      refuse(function, "x has shape ", shape_text(x), ", but the cache has ", cache.batch, " sequences");
    const auto check = [&](const char* what, std::int64_t of_cache, std::int64_t of_layer) {
      if (of_cache != of_layer) refuse(function, "the cache has ", what, " ", of_cache, ", but the layer ", of_layer);
    };
    check("num_kv_heads", cache.num_kv_heads, weights_.num_kv_heads);
    check("head_dim", cache.key.width, weights_.head_dim);
    check("value_dim", cache.value.width, weights_.value_dim);
    const DType computed = computed_in(weights_.dtype);
    if (cache.dtype != computed && size_of(cache.dtype) >= size_of(computed))
      throw py::type_error(std::string(function) + ": the cache holds " + name_of(cache.dtype) +
                           ", but the layer computes in " + name_of(computed));
  }

  TensorView input_view(const char* function, const char* name, py::handle array, std::int64_t depth) const {
    const TensorView view = matching_view(function, name, array, "w_q", weights_.dtype);
    if (view.ndim < 2 || view.ndim >= max_axes)
      refuse(function, name, " has shape ", shape_text(view), " but needs 2 dimensions or more: (..., S, d_model)");
    if (view.extent(0) != depth)
      refuse(function, name, " has d_model ", view.extent(0), " but the weights have ", depth, " rows");
    return view;
  }

  const LayerWeights weights_;
};

constexpr const char* layer_name = "selfattn.Layer";

// A capsule rather than a class: pybind11 registers instances where a failed allocation ends the process.
py::capsule make_layer(const py::tuple& matrices, const py::tuple& biases, std::int64_t num_heads,
                       std::int64_t num_kv_heads, py::handle rope) {
  auto layer = std::make_unique<Layer>(matrices[0], matrices[1], matrices[2], matrices[3], biases, num_heads,
                                       num_kv_heads, rope);
  py::capsule owner(layer.get(), layer_name,
                    [](PyObject* capsule) { delete static_cast<Layer*>(PyCapsule_GetPointer(capsule, layer_name)); });
  static_cast<void>(layer.release());  // the capsule's now
  return owner;
}

const Layer& layer_of(const py::capsule& capsule) { return *capsule.get_pointer<Layer>(); }

// In one tuple, because pybind11 allocates memory for more than six arguments.
py::object call_layer(const py::capsule& capsule, const char* function, const py::tuple& inputs, py::object out,
                      const py::tuple& option_values) {
  return layer_of(capsule).call(function, inputs, std::move(out), option_values);
}

const char* layer_isa(const py::capsule& capsule) { return layer_of(capsule).isa(); }

py::tuple unpack_layer(const py::capsule& capsule, const py::tuple& matrices) {
  return layer_of(capsule).unpack(matrices);
}

// x and out (..., length, heads..., head_dim) in one shape; positions has one integer per entry of the axes in front
// of head_dim, broadcast by strides. Python's layer has prepared all of this.
void apply_rope(py::handle x, py::handle positions, py::handle out, py::handle rope_description) {
  const TensorView from = float_view("apply_rope", "x", x);
  const TensorView to = view_of(py::reinterpret_borrow<py::array>(out), from.dtype);
  const TensorView places = optional_view(positions, DType::i64);
  const Rope rope = *rope_of(rope_description);
  const std::int64_t head_dim = from.extent(0);
  std::vector<double> tables(static_cast<std::size_t>(rope.rotary_dim));
  double* cosines = tables.data();
  double* sines = cosines + rope.rotary_dim / 2;
  std::int64_t vectors = 1;
  for (int axis = 1; axis < from.ndim; ++axis) vectors *= from.extent(axis);
  const py::gil_scoped_release release;
  bool known = false;
  std::int64_t last = 0;
  for (std::int64_t index = 0; index < vectors; ++index) {
    const char* source = static_cast<const char*>(from.data);
    char* target = static_cast<char*>(to.data);
    const char* place = static_cast<const char*>(places.data);
    std::int64_t rest = index;
    for (int axis = 1; axis < from.ndim; ++axis) {
      const std::int64_t i = rest % from.extent(axis);
      rest /= from.extent(axis);
      source += i * from.stride(axis);
      target += i * to.stride(axis);
      place += i * places.stride(axis - 1);
    }
    std::int64_t position;
    std::memcpy(&position, place, sizeof position);
    if (!known || position != last) rope_tables(rope, position, cosines, sines);
    known = true;
    last = position;
    rope_rotate(rope, from.dtype, head_dim, cosines, sines, source, from.stride(0), target, to.stride(0));
  }
}

}  // namespace

void register_layer(py::module_& module) {
  module.def("make_layer", &make_layer);
  module.def("call_layer", &call_layer);
  module.def("layer_isa", &layer_isa);
  module.def("unpack_layer", &unpack_layer);
  module.def("apply_rope", &apply_rope);
}

}  // namespace selfattn::bindings
