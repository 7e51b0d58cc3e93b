// The core's part of SelfAttention, and apply_rope.
#include "layer.h"

#include <memory>
#include <utility>

#include "bindings/attention.h"
#include "bindings/cache_arguments.h"
#include "bindings/linear.h"
#include "message.h"
#include "parallel.h"
#include "registry.h"
#include "rope.h"

namespace selfattn::bindings {

namespace {

// What a layer's weights require of x and context: their dtype, and the rows of w_q and of w_k.
struct Needed {
  DType dtype;
  std::int64_t query_rows, key_rows;
};

TensorView input_view(const char* function, const char* name, py::handle array, DType dtype, std::int64_t depth) {
  const TensorView view = matching_view(function, name, array, "w_q", dtype);
  if (view.ndim < 2 || view.ndim >= max_axes)
    refuse(function, Argument{name}, " has shape ", shape_text(view),
           " but needs 2 dimensions or more: (..., S, d_model)");
  if (view.extent(0) != depth)
    refuse(function, Argument{name}, " has d_model ", view.extent(0), " but the weights have ", depth, " rows");
  return view;
}

// The views of x and context; context may be None.
std::pair<TensorView, TensorView> checked(const char* function, py::handle x, py::handle context,
                                          const Needed& needed) {
  const auto [dtype, query_rows, key_rows] = needed;
  const TensorView input = input_view(function, "x", x, dtype, query_rows);
  if (!context.is_none()) return {input, input_view(function, "context", context, dtype, key_rows)};
  if (key_rows != query_rows)
    refuse(function, "x"_arg, " has d_model ", query_rows, " but ", "w_k"_arg, " has ", key_rows,
           " rows: without context they must agree");
  return {input, {}};
}

class Layer {
 public:
  static constexpr const char* capsule_name = "selfattn.Layer";

  // All arrays have one dtype, and the Python layer has checked their shapes. The rope may be None.
  Layer(const UnpackedWeights& weights, const LayerNorms& norms, std::int64_t num_heads, std::int64_t num_kv_heads,
        py::object rope)
      : rope_(std::move(rope)), norms_(norms), weights_(make(weights, norms_, num_heads, num_kv_heads, rope_)) {}

  py::object call(const char* function, const LayerInputs& inputs, py::object out, py::handle option_values) const {
    const py::handle x = inputs.x;
    const auto [input, other] =
        checked(function, x, inputs.context, {weights_.dtype, weights_.query.depth(), weights_.key.depth()});
    const TensorView positions = optional_view(inputs.positions, DType::i64);
    std::optional<CacheArguments> source;
    open_cache(source, function, inputs.step, input);
    const AttentionArguments arguments = arguments_of(function, options_of(option_values), {}, {}, {});
    LayerCall call(weights_, input, other, positions, source ? &source->step() : nullptr, arguments);
    const TensorView added = residual_view(function, inputs.residual, weights_.dtype, call.out_shape());
    bool direct = false;
    if (!out.is_none()) {
      const py::array given = py::reinterpret_borrow<py::array>(out);
      check_out(function, given, call.out_shape(), weights_.dtype);
      const TensorView view = view_of(given, weights_.dtype);
      direct = (given.flags() & py::array::c_style) != 0 && !meet(view, input) && !meet(view, other) &&
               !meet(view, positions) && (!meet(view, added) || same(view, added)) && !meets_any(view, arguments) &&
               !(source && source->meets(view));
    }
    Destination result(std::move(out), direct, call.out_shape(), weights_.dtype, x);
    const Extras extras(arguments, call.problem());
    py::object results;
    const auto work = [&] {
      bool finished;
      {
        const CoreCall call_of_core(call.flops());
        finished = call.run(result.view(weights_.dtype), added, arguments.num_threads, interrupted);
      }
      if (!finished) throw py::error_already_set();
      results = extras.join(result.deliver());
    };
    if (source)
      source->run(work);
    else
      work();
    return results;
  }

  const char* isa() const { return weights_.kernels->name; }

  // Writes the weights to the matrices, and sets the biases. w_o and b_o are used only if the layer has them.
  void unpack_all(UnpackedWeights& to) const {
    const auto unpack_one = [&](const Projection& projection, py::handle matrix) {
      return unpack(projection, view_of(py::reinterpret_borrow<py::array>(matrix), weights_.dtype));
    };
    to.b_q = unpack_one(weights_.query, to.w_q);
    to.b_k = unpack_one(weights_.key, to.w_k);
    to.b_v = unpack_one(weights_.value, to.w_v);
    if (weights_.output) to.b_o = unpack_one(*weights_.output, to.w_o);
  }

 private:
  static LayerWeights make(const UnpackedWeights& from, const LayerNorms& norms, std::int64_t num_heads,
                           std::int64_t num_kv_heads, py::handle rope) {
    const KernelSet& kernels = active_kernels();
    const DType dtype = float_view("SelfAttention", "w_q", from.w_q).dtype;
    const auto projection = [&](py::handle weights, py::handle bias) {
      return Projection(kernels, optional_view(weights, dtype), optional_view(bias, dtype));
    };
    const auto columns = [](py::handle w) { return py::reinterpret_borrow<py::array>(w).shape(1); };
    LayerWeights layer{&kernels,
                       dtype,
                       num_heads,
                       num_kv_heads,
                       columns(from.w_q) / num_heads,
                       columns(from.w_v) / num_kv_heads,
                       projection(from.w_q, from.b_q),
                       projection(from.w_k, from.b_k),
                       projection(from.w_v, from.b_v),
                       std::nullopt,
                       rope_of(rope),
                       norm_or_none(norms.norm),
                       norm_or_none(norms.post_norm),
                       {norm_or_none(norms.q_norm), norms.q_width},
                       {norm_or_none(norms.k_norm), norms.k_width}};
    if (!from.w_o.is_none()) layer.output.emplace(projection(from.w_o, from.b_o));
    return layer;
  }

  void open_cache(std::optional<CacheArguments>& found, const char* function, py::handle step,
                  const TensorView& x) const {
    if (step.is_none()) return;
    if (x.ndim != 3)
      refuse(function, "x"_arg, " has shape ", shape_text(x), ", but a cache needs (batch, tokens, d_model)");
    found.emplace(function, Record<Step>::in(step), x.extent(1));
    const Cache& cache = found->cache();
    if (x.extent(2) != cache.batch)
      refuse(function, "x"_arg, " has shape ", shape_text(x), ", but the cache has ", cache.batch, " sequences");
    const auto check = [&](const char* what, std::int64_t of_cache, std::int64_t of_layer) {
      if (of_cache != of_layer)
        refuse(function, "the cache has ", what, " ", of_cache, ", but the layer has ", of_layer);
    };
    check("num_kv_heads", cache.num_kv_heads, weights_.num_kv_heads);
    check("head_dim", cache.key.width, weights_.head_dim);
    check("value_dim", cache.value.width, weights_.value_dim);
    const DType computed = computed_in(weights_.dtype);
    if (cache.dtype != computed && !takes_less(cache.dtype, computed))
      refuse<TypeRefusal>(function, "the cache holds ", name_of(cache.dtype), ", but the layer computes in ",
                          name_of(computed));
  }

  const py::object rope_;  // a _core.Rope or None
  const LayerNorms norms_;
  const LayerWeights weights_;
};

py::capsule make_layer(py::handle weights, py::handle norms, std::int64_t num_heads, std::int64_t num_kv_heads,
                       py::object rope) {
  return capsule_of(std::make_unique<Layer>(Record<UnpackedWeights>::in(weights), Record<LayerNorms>::in(norms),
                                            num_heads, num_kv_heads, std::move(rope)));
}

// The inputs are one object, because pybind11 allocates memory for a call with more than six arguments.
py::object call_layer(const py::capsule& capsule, const char* function, py::handle inputs, py::object out,
                      py::handle option_values) {
  return held_by<Layer>(capsule).call(function, Record<LayerInputs>::in(inputs), std::move(out), option_values);
}

// For the gradients of a layer, which Python computes. The Python layer has checked the matrices.
void check_layer_inputs(const char* function, py::handle x, py::handle context, const py::array& w_q,
                        const py::array& w_k) {
  checked(function, x, context, {float_view(function, "w_q", w_q).dtype, w_q.shape(0), w_k.shape(0)});
}

const char* layer_isa(const py::capsule& capsule) { return held_by<Layer>(capsule).isa(); }

void unpack_layer(const py::capsule& capsule, py::handle weights) {
  held_by<Layer>(capsule).unpack_all(Record<UnpackedWeights>::in(weights));
}

// x and out have the same shape (..., tokens, heads, head_dim). positions broadcasts to (..., tokens). If the rope has
// axes, positions has an additional first axis for the coordinates. The Python layer has ensured this.
void apply_rope(py::handle x, py::handle positions, py::handle out, py::handle rope_description, bool inverse,
                int num_threads) {
  const TensorView from = float_view("apply_rope", "x", x);
  const TensorView to = view_of(py::reinterpret_borrow<py::array>(out), from.dtype);
  const Rotation all{from, to, optional_view(positions, DType::i64), nullptr, inverse};
  const Rope rope = *rope_of(rope_description);
  const py::gil_scoped_release release;
  rotate(rope, &all, 1, num_threads, nullptr);
}

}  // namespace

void register_layer(py::module_& module) {
  module.def("make_layer", &make_layer);
  module.def("call_layer", &call_layer);
  module.def("check_layer_inputs", &check_layer_inputs);
  module.def("layer_isa", &layer_isa);
  module.def("unpack_layer", &unpack_layer);
  module.def("apply_rope", &apply_rope);
}

}  // namespace selfattn::bindings
