// Appending to caches and attending to them.
#include "cache_call.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/attention.h"
#include "bindings/cache_arguments.h"
#include "message.h"
#include "registry.h"
#include "rows.h"

namespace selfattn::bindings {
namespace {

void check_tokens(const char* function, const char* name, const TensorView& view, const Shape& wanted) {
  if (view.ndim != wanted.ndim || !std::equal(wanted.extent, wanted.extent + wanted.ndim, view.shape))
    refuse(function, Argument{name}, " has shape ", shape_text(view), ", but this cache and call need ",
           to_text(wanted.extent, wanted.ndim));
}

Shape shape_of(std::int64_t batch, std::int64_t heads, std::int64_t count, std::int64_t width, Layout layout) {
  const bool heads_last = layout == Layout::bshd;
  Shape shape;
  shape.append(batch);
  shape.append(heads_last ? count : heads);
  shape.append(heads_last ? heads : count);
  shape.append(width);
  return shape;
}

Shape last_axes(int rank, const Shape& shape) {
  Shape last;
  for (int axis = shape.ndim - rank; axis < shape.ndim; ++axis) last.append(shape.extent[axis]);
  return last;
}

// A view of tokens. Tokens that may share memory with the cache are copied first, because storing could overwrite them
// before they are read.
class SafeTokens {
 public:
  SafeTokens(py::handle array, const TensorView& view, const CacheArguments& cache) : view_(view) {
    if (!cache.meets(view)) return;
    copy_ = array.attr("copy")();
    view_ = view_of(py::reinterpret_borrow<py::array>(copy_), view.dtype);
  }
  const TensorView& view() const { return view_; }

 private:
  py::object copy_;
  TensorView view_;
};

// Tokens (batch, heads, tokens, width) for a KVCache; (heads, tokens, width) for the sequence of a PagedKVCache.
void append(const char* function, py::handle step, py::handle k, py::handle v) {
  const TensorView key = float_view(function, "k", k), value = matching_view(function, "v", v, "k", key.dtype);
  Step& state = Record<Step>::in(step);
  const int rank = state.ids.is_none() ? 4 : 3;
  const std::int64_t count = key.ndim == rank ? key.extent(1) : 0;
  CacheArguments arguments(function, state, count);
  const Cache& cache = arguments.cache();
  const auto wanted = [&](std::int64_t width) {
    return last_axes(rank, shape_of(cache.batch, cache.num_kv_heads, count, width, Layout::bhsd));
  };
  check_tokens(function, "k", key, wanted(cache.key.width));
  check_tokens(function, "v", value, wanted(cache.value.width));
  const SafeTokens keys(k, key, arguments), values(v, value, arguments);
  const KernelSet& kernels = active_kernels();
  arguments.run([&] {
    const CoreCall call_of_core(static_cast<double>(count * cache.batch * cache.num_kv_heads * cache.key.width));
    arguments.step().store(kernels, TokensView(keys.view(), Layout::bhsd).view,
                           TokensView(values.view(), Layout::bhsd).view);
  });
}

// Takes back the last call that used a Step, if that call has committed. The Python layer does so, for example, if an
// interrupt came after the commit.
void undo(py::handle object) {
  Step& step = Record<Step>::in(object);
  if (!step.committed) return;
  step.committed = false;
  step.pages ? step.pages->undo() : held_by<HeldLedger>(step.sequences).ledger.undo();
}

Step step_on(py::object store, py::object sequences) {
  Step step;
  step.store = std::move(store);
  step.sequences = std::move(sequences);
  return step;
}

// Prepares a Step for another call on the same store.
void renew(py::handle object, py::object sequences, py::object ids) {
  Step& step = Record<Step>::in(object);
  if (!step.sequences.is(sequences)) step = step_on(step.store, std::move(sequences));  // what it held is of others
  step.ids = std::move(ids);
  step.committed = false;
}

const std::int64_t* integers(const py::array& array) { return static_cast<const std::int64_t*>(array.data()); }

// Reorders all heads in one call, so that no interrupt can come between two heads. The Python layer has checked the
// index.
void reorder(py::object store, py::object ledger, const py::array& index) {
  Step step = step_on(std::move(store), std::move(ledger));
  CacheArguments arguments("reorder", step, 0);
  const Cache& cache = arguments.cache();
  double rows = 0;
  for (std::int64_t b = 0; b < cache.batch; ++b) rows += static_cast<double>(cache.lengths[b]);
  const CoreCall call_of_core(rows * static_cast<double>(cache.num_kv_heads * cache.key.tokens.row));
  arguments.step().reorder(integers(index));
}

// For truncate and set_lengths, the Python layer has checked the shapes of the arrays.
void truncate(py::object store, py::object ledger, const py::array& lengths) {
  Step step = step_on(std::move(store), std::move(ledger));
  CacheArguments("truncate", step, 0).step().truncate("truncate", integers(lengths));
}

void set_lengths(py::object store, py::object ledger, const py::array& lengths, const py::array& starts) {
  Step step = step_on(std::move(store), std::move(ledger));
  CacheArguments("KVCache", step, 0).step().set(integers(lengths), integers(starts));
}

// Checks that the cache has the type of the queries or a narrower one.
void check_type(const char* function, const Cache& cache, DType query) {
  if (cache.dtype == query || takes_less(cache.dtype, query)) return;
  refuse<TypeRefusal>(function, "the cache holds ", name_of(cache.dtype), ", but ", "q"_arg, " has ", name_of(query),
                      ": it must hold the same or a narrower type");
}

void check_query(const char* function, const Cache& cache, const TensorView& q, Layout layout) {
  if (q.ndim != 4 || q.extent(3) != cache.batch)
    refuse(function, "q"_arg, " has shape ", shape_text(q), ", but ",
           layout == Layout::bshd ? "(batch, q_len, heads, head_dim)" : "(batch, heads, q_len, head_dim)",
           " is needed, with batch ", cache.batch, " for the sequences of the cache");
  if (q.extent(0) != cache.key.width)
    refuse(function, "q"_arg, " has head_dim ", q.extent(0), " but the cache has ", cache.key.width);
}

// The function's name is not a `const char*`, because pybind11 would allocate memory for it.
py::object attend_cache(py::handle function_name, py::handle step, py::handle operands, py::object out,
                        py::handle option_values) {
  const CacheInputs& inputs = Record<CacheInputs>::in(operands);
  const char* const function = PyUnicode_AsUTF8(function_name.ptr());
  const Options& options = options_of(option_values);
  const Layout layout = options.layout;
  const TensorView q = float_view(function, "q", inputs.q);
  const DType type = inputs.unrounded ? computed_in(q.dtype) : q.dtype;
  const bool appends = !inputs.k.is_none();
  const TensorView k = appends ? float_view(function, "k", inputs.k) : TensorView{};
  const TensorView v = appends ? matching_view(function, "v", inputs.v, "k", k.dtype) : TensorView{};
  const std::int64_t q_len = q.ndim == 4 ? q.extent(layout == Layout::bshd ? 2 : 1) : 0;
  const std::int64_t more = !appends ? 0 : inputs.tokens < 0 ? q_len : inputs.tokens;
  CacheArguments source(function, Record<Step>::in(step), more, inputs.skipped);
  const Cache& cache = source.cache();
  check_query(function, cache, q, layout);
  check_type(function, cache, q.dtype);
  if (appends) {
    check_tokens(function, "k", k, shape_of(cache.batch, cache.num_kv_heads, more, cache.key.width, layout));
    check_tokens(function, "v", v, shape_of(cache.batch, cache.num_kv_heads, more, cache.value.width, layout));
  }
  const SafeTokens new_keys(inputs.k, k, source), new_values(inputs.v, v, source);
  const AttentionArguments arguments = arguments_of(function, options, q, {}, {});
  CacheCall call(
      source.step(),
      {q, new_keys.view(), new_values.view(), optional_view(inputs.positions, DType::i64), rope_of(inputs.rope)},
      arguments);
  Problem& problem = call.problem();

  bool direct = false;
  if (!out.is_none()) {
    const py::array given = py::reinterpret_borrow<py::array>(out);
    check_out(function, given, out_shape(problem), type);
    const TensorView view = view_of(given, type);
    direct = !meets_any(view, arguments) && !meet(view, q) && !source.meets(view);
  }
  Destination result(std::move(out), direct, out_shape(problem), type, inputs.q);
  attach_out(problem, result.view(type));
  const Extras extras(arguments, problem);
  const Plan plan = make_plan(problem, active_kernels());
  py::object results;
  source.run([&] {
    bool finished;
    {
      const CoreCall call_of_core(plan.flops);
      finished = call.run(plan, options.num_threads, interrupted);
    }
    if (!finished) throw py::error_already_set();
    results = extras.join(result.deliver());
  });
  return results;
}

py::capsule make_cache_store(py::handle k, py::handle v, py::handle dtype, std::int64_t window) {
  const CacheTokens &keys = Record<CacheTokens>::in(k), &values = Record<CacheTokens>::in(v);
  return capsule_of(std::make_unique<HeldStore>(keys, values, enum_of<DType>(dtype), window));
}

// Converts contiguous rows of stored elements (..., words) to floats (..., width), without their scales. The Python
// layer has checked that `rows` has an axis of words, enough of them for `width`.
py::array unpack(const py::array& rows, py::handle dtype, std::int64_t width) {
  const DType from = enum_of<DType>(dtype);
  std::vector<py::ssize_t> extents(rows.shape(), rows.shape() + rows.ndim());
  extents.back() = width;
  py::array_t<float> numbers(extents);
  const std::int64_t count = width == 0 ? 0 : numbers.size() / width, bytes = row_bytes(from, width);
  const SourceRows source{{static_cast<const char*>(rows.data()), bytes, size_of(from)}, from};
  gather_rows(active_kernels(), reinterpret_cast<char*>(numbers.mutable_data()), DType::f32, source, count, width);
  return numbers;
}

py::capsule make_ledger(py::array copies, py::array active) {
  return capsule_of(std::make_unique<HeldLedger>(std::move(copies), std::move(active)));
}

py::capsule make_page_table(py::array pages, py::array lengths, py::object starts) {
  return capsule_of(std::make_unique<HeldTable>(std::move(pages), std::move(lengths), std::move(starts)));
}

constexpr Field<Step> step_fields[] = {
    field<Step, &Step::store>("store"),
    field<Step, &Step::sequences>("sequences"),
    field<Step, &Step::ids>("ids"),
};

}  // namespace

void register_cache(py::module_& module) {
  using py::literals::operator""_a;
  Record<Step>::add(module, "Step", step_fields);
  module.def("make_cache_store", &make_cache_store, py::kw_only(), "k"_a, "v"_a, "dtype"_a, "window"_a);
  module.def("unpack", &unpack);
  module.def("make_ledger", &make_ledger, py::kw_only(), "copies"_a, "active"_a);
  module.def("make_page_table", &make_page_table, py::kw_only(), "pages"_a, "lengths"_a, "starts"_a);
  module.def("is_possible", &is_possible);
  module.def("append", &append);
  module.def("attend_cache", &attend_cache);
  module.def("undo", &undo);
  module.def("renew", &renew);
  module.def("reorder", &reorder);
  module.def("truncate", &truncate);
  module.def("set_lengths", &set_lengths);
}

}  // namespace selfattn::bindings
