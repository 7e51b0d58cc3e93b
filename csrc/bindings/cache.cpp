// Appending to caches and attending to them.
#include "cache.h"

#include <algorithm>
#include <string>

#include "attend.h"
#include "bindings/attention.h"
#include "bindings/cache_arguments.h"
#include "message.h"
#include "registry.h"
#include "scratch_pool.h"

namespace selfattn::bindings {
namespace {

// New tokens or queries: (batch, heads, count, width), in layout bshd with the middle axes swapped.
Tokens tokens_of(const TensorView& view, bool bshd) {
  const int heads = bshd ? 1 : 2, count = bshd ? 2 : 1;
  return {static_cast<const char*>(view.data),
          view.dtype,
          view.extent(3),
          view.extent(heads),
          view.extent(count),
          view.extent(0),
          view.stride(3),
          view.stride(heads),
          view.stride(count),
          view.stride(0)};
}

void check_tokens(const char* function, const char* name, const TensorView& view, const Shape& wanted) {
  if (view.ndim != wanted.ndim || !std::equal(wanted.extent, wanted.extent + wanted.ndim, view.shape))
    refuse(function, name, " has shape ", shape_text(view), ", but this cache and call need ",
           to_text(wanted.extent, wanted.ndim));
}

Shape shape_of(std::int64_t batch, std::int64_t heads, std::int64_t count, std::int64_t width, bool bshd) {
  Shape shape;
  shape.append(batch);
  shape.append(bshd ? count : heads);
  shape.append(bshd ? heads : count);
  shape.append(width);
  return shape;
}

// A view of the same elements in memory of its own, where the cache may overwrite those before they are read.
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

// Memory that a call takes beside the attention's own.
struct StepMemory {
  Scratch block;
  std::int64_t* lengths;  // with the new tokens
  std::int64_t* first;    // position of the first query
  double* tables;
  char* row;
  char* query;

  static std::size_t aligned(std::int64_t bytes) { return static_cast<std::size_t>((bytes + 63) / 64 * 64); }

  StepMemory(const Cache& cache, const std::optional<Rope>& rope, std::int64_t query_bytes)
      : block(2 * aligned(cache.batch * 8) + aligned(rope ? rope->rotary_dim * 8 : 0) + aligned(row_bytes(cache)) +
              aligned(query_bytes)) {
    char* p = block.data();
    const auto take = [&](std::int64_t bytes) {
      char* piece = p;
      p += aligned(bytes);
      return piece;
    };
    lengths = reinterpret_cast<std::int64_t*>(take(cache.batch * 8));
    first = reinterpret_cast<std::int64_t*>(take(cache.batch * 8));
    tables = reinterpret_cast<double*>(take(rope ? rope->rotary_dim * 8 : 0));
    row = take(row_bytes(cache));
    query = take(query_bytes);
  }

  static std::int64_t row_bytes(const Cache& cache) { return 16 * std::max(cache.key.width, cache.value.width); }
};

void append(const char* function, const py::tuple& values, py::handle k, py::handle v) {
  const TensorView key = float_view(function, "k", k), value = matching_view(function, "v", v, "k", key.dtype);
  const std::int64_t count = key.ndim == 4 ? key.extent(1) : 0;
  const CacheArguments arguments(function, values, count);
  const Cache& cache = arguments.cache();
  check_tokens(function, "k", key, shape_of(cache.batch, cache.num_kv_heads, count, cache.key.width, false));
  check_tokens(function, "v", value, shape_of(cache.batch, cache.num_kv_heads, count, cache.value.width, false));
  const SafeTokens keys(k, key, arguments), vals(v, value, arguments);
  const Scratch row(static_cast<std::size_t>(StepMemory::row_bytes(cache)));
  const KernelSet& kernels = active_kernels();
  arguments.claim();
  const CoreCall call_of_core(static_cast<double>(count * cache.batch * cache.num_kv_heads * cache.key.width));
  store_tokens(kernels, cache, cache.key, tokens_of(keys.view(), false), {}, row.data());
  store_tokens(kernels, cache, cache.value, tokens_of(vals.view(), false), {}, row.data());
  arguments.commit();
}

// In one call, so that no interrupt comes between the tokens of two heads. The index has been checked.
void reorder(const py::tuple& values, const py::array& index) {
  CacheArguments("reorder", values, 0).reorder(static_cast<const std::int64_t*>(index.data()));
}

// The type that the cache may have where queries have this one.
void check_type(const char* function, const Cache& cache, DType query) {
  if (cache.dtype == query || size_of(cache.dtype) < size_of(query)) return;
  throw py::type_error(std::string(function) + ": the cache holds " + name_of(cache.dtype) + ", but q has " +
                       name_of(query) + ": it must hold the same or a narrower type");
}

void check_query(const char* function, const Cache& cache, const TensorView& q, bool bshd) {
  if (q.ndim != 4 || q.extent(3) != cache.batch)
    refuse(function, "q has shape ", shape_text(q), ", but ", cache.batch, " sequences need ",
           bshd ? "(batch, q_len, heads, head_dim)" : "(batch, heads, q_len, head_dim)", " with that batch");
  if (q.extent(0) != cache.key.width)
    refuse(function, "q has head_dim ", q.extent(0), " but the cache has ", cache.key.width);
}

// inputs: q, k and v or None, rope or None, positions or None, whether the result is to be of the type of computation.
// The function's name is no `const char*`, for which pybind11 allocates memory.
py::object attend_cache(py::handle function_name, const py::tuple& cache_values, const py::tuple& inputs,
                        py::object out, const py::tuple& option_values) {
  const char* const function = PyUnicode_AsUTF8(function_name.ptr());
  const Options options(option_values);
  const TensorView q = float_view(function, "q", inputs[0]);
  const DType type = inputs[5].cast<bool>() ? computed_in(q.dtype) : q.dtype;
  const bool appends = !inputs[1].is_none();
  const TensorView k = appends ? float_view(function, "k", inputs[1]) : TensorView{};
  const TensorView v = appends ? matching_view(function, "v", inputs[2], "k", k.dtype) : TensorView{};
  const std::int64_t q_len = q.ndim == 4 ? q.extent(options.bshd ? 2 : 1) : 0, more = appends ? q_len : 0;
  const CacheArguments source(function, cache_values, more);
  const Cache& cache = source.cache();
  check_query(function, cache, q, options.bshd);
  check_type(function, cache, q.dtype);
  if (appends) {
    check_tokens(function, "k", k, shape_of(cache.batch, cache.num_kv_heads, q_len, cache.key.width, options.bshd));
    check_tokens(function, "v", v, shape_of(cache.batch, cache.num_kv_heads, q_len, cache.value.width, options.bshd));
  }
  const std::optional<Rope> rope = rope_of(inputs[3]);
  const Tokens queries = tokens_of(q, options.bshd);
  const std::int64_t query_bytes =
      rope ? bytes_of(queries.batch, queries.heads, queries.count, queries.width, size_of(q.dtype)) : 0;
  const StepMemory memory(cache, rope, query_bytes);
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    memory.lengths[b] = cache.lengths[b] + more;
    memory.first[b] = memory.lengths[b] - q_len;
  }

  AttentionArguments arguments = arguments_of(function, options, q, {}, {});
  CachedKeys keys(cache, memory.lengths);
  keys.place(arguments);
  arguments.recent_mask = static_cast<bool>(arguments.mask);
  // A rotated query stands in memory of this call: C-contiguous, heads first.
  const std::int64_t size = size_of(q.dtype);
  const std::int64_t row = queries.width * size, head = queries.count * row, batch = queries.heads * head;
  const std::int64_t turned_strides[] = {batch, options.bshd ? row : head, options.bshd ? head : row, size};
  if (rope) arguments.q = {memory.query, q.dtype, 4, q.shape, turned_strides};
  Problem problem = make_problem(arguments);

  bool direct = false;
  if (!out.is_none()) {
    const py::array given = py::reinterpret_borrow<py::array>(out);
    check_out(function, given, out_shape(problem), type);
    const TensorView view = view_of(given, type);
    direct = !meets_any(view, arguments) && !meet(view, q) && !source.meets(view);
  }
  Destination result(std::move(out), direct, out_shape(problem), type, inputs[0]);
  attach_out(problem, result.view(type));
  const Extras extras(options, problem);
  const KernelSet& kernels = active_kernels();
  const Plan plan = make_plan(problem, kernels, options.num_threads);
  const SafeTokens new_keys(inputs[1], k, source), new_values(inputs[2], v, source);
  const Turn turn{rope ? &*rope : nullptr, optional_view(inputs[4], DType::i64), memory.first, memory.tables};
  if (appends) source.claim();
  bool finished;
  {
    const CoreCall call_of_core(plan.flops);
    if (rope) turn_tokens(queries, turn, memory.query);
    if (appends) {
      store_tokens(kernels, cache, cache.key, tokens_of(new_keys.view(), options.bshd), turn, memory.row);
      store_tokens(kernels, cache, cache.value, tokens_of(new_values.view(), options.bshd), {}, memory.row);
    }
    finished = attend(problem, plan, interrupted);
  }
  if (!finished) throw py::error_already_set();
  py::object results = extras.join(result.deliver());
  source.commit();  // last: nothing can fail any more
  return results;
}

}  // namespace

void register_cache(py::module_& module) {
  module.def("append", &append);
  module.def("attend_cache", &attend_cache);
  module.def("reorder", &reorder);
}

}  // namespace selfattn::bindings
