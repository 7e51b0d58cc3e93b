#include "layer.h"

#include <algorithm>

#include "attend.h"
#include "carver.h"
#include "plan.h"

namespace selfattn {
namespace {

std::int64_t zero = 0;
constexpr TensorView first_token{&zero, DType::i64, 0, nullptr, nullptr};

std::int64_t row_count(const TensorView& x) {
  std::int64_t rows = 1;
  for (int axis = 0; axis < x.ndim - 1; ++axis) rows *= x.shape[axis];
  return rows;
}

}  // namespace

BufferView::BufferView(char* data, DType dtype, const TensorView& x, std::int64_t heads, std::int64_t dim)
    : view{data, dtype, x.ndim + 1, shape, strides} {
  std::copy_n(x.shape, x.ndim - 1, shape);
  shape[x.ndim - 1] = heads;
  shape[x.ndim] = dim;
  std::int64_t stride = size_of(dtype);
  for (int axis = x.ndim; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= shape[axis];
  }
}

LayerMemory::LayerMemory(char* base, const LayerWeights& layer, std::int64_t query_rows, std::int64_t key_rows) {
  Carver carver{base};
  const auto take = [&](const Projection& projection, std::int64_t rows) {
    return carver.take<char>(bytes_of(rows, projection.columns(), size_of(projection.computation())));
  };
  query = take(layer.query, query_rows);
  key = take(layer.key, key_rows);
  value = take(layer.value, key_rows);
  carver.take<char>(1);  // arrays without elements still need an address
  bytes = carver.used;
}

LayerCall::LayerCall(const LayerWeights& layer, const TensorView& x, const TensorView& context,
                     const TensorView& positions, CacheStep* step, AttentionArguments arguments)
    : layer_(layer),
      dtype_(computed_in(layer.dtype)),
      x_(x),
      context_(context ? context : x),
      positions_(positions),
      query_rows_(row_count(x_)),
      key_rows_(row_count(context_)),
      step_(step),
      memory_(LayerMemory(nullptr, layer, query_rows_, key_rows_).bytes),
      inputs_(memory_.data(), layer, query_rows_, key_rows_),
      query_(inputs_.query, dtype_, x_, layer.num_heads, layer.head_dim),
      key_(inputs_.key, dtype_, context_, layer.num_kv_heads, layer.head_dim),
      value_(inputs_.value, dtype_, context_, layer.num_kv_heads, layer.value_dim) {
  arguments.q = query_.view;
  arguments.k = key_.view;
  arguments.v = value_.view;
  arguments.layout = Layout::bshd;
  if (!step && !context) {
    arguments.same_tokens = true;
    // Query i and key i are the same token. Without a q_offset, the last valid query would be aligned with the last
    // key, which is another token if only q_lens is given.
    if (!arguments.q_offset && !arguments.kv_lens) arguments.q_offset = first_token;
  }
  // Overrides the caller's precision: the projections of a bfloat16 layer are only accurate to bfloat16, so attention
  // need not be more accurate.
  if (layer.query.pairs()) arguments.precision = Precision::medium;
  problem_ = step ? step->problem_of(arguments) : make_problem(arguments);
  if (layer.output)
    heads_.emplace(static_cast<std::size_t>(
        bytes_of(problem_.batch, problem_.q_len, layer.num_heads, layer.value_dim, size_of(dtype_))));
}

bool LayerCall::normalise(const HeadNorm& norm, const BufferView& heads, int num_threads,
                          Interrupted interrupted) const {
  if (!norm.norm) return true;
  std::int64_t numbers = 1;
  for (int axis = 0; axis < heads.view.ndim; ++axis) numbers *= heads.shape[axis];
  const RowsView rows(heads.data(), dtype_, numbers / norm.count, norm.count);
  return normalise_all({.kernels = *layer_.kernels,
                        .norm = *norm.norm,
                        .count = norm.count,
                        .x = rows,
                        .residual = nullptr,
                        .out = heads.data(),
                        .out_dtype = dtype_,
                        .out_stride = norm.count * size_of(dtype_)},
                       num_threads, interrupted);
}

// Rotates queries and keys in place. `positions` belong to the tokens of x, so they apply to keys only if there is no
// context.
bool LayerCall::rotate(int num_threads, Interrupted interrupted) const {
  const std::int64_t* ends = step_ ? step_->lengths_after() : nullptr;
  const Rotation rotations[] = {{query_.view, query_.view, positions_, ends},
                                {key_.view, key_.view, one_input() ? positions_ : TensorView{}, ends}};
  return selfattn::rotate(*layer_.rope, rotations, 2, num_threads, interrupted);
}

Shape LayerCall::out_shape() const {
  Shape shape = selfattn::out_shape(problem_);
  --shape.ndim;  // heads and value_dim become one axis
  shape.extent[shape.ndim - 1] = layer_.output ? layer_.output->columns() : layer_.num_heads * layer_.value_dim;
  return shape;
}

double LayerCall::flops() const {
  const auto product = [](auto... sizes) { return (2.0 * ... * static_cast<double>(sizes)); };
  const Problem& p = problem_;
  return product(query_rows_, layer_.query.depth(), layer_.query.columns()) +
         product(key_rows_, layer_.key.depth(), layer_.key.columns() + layer_.value.columns()) +
         product(p.batch, p.num_heads, p.q_len, p.kv_len, p.head_dim + p.value_dim);
}

bool LayerCall::run(const TensorView& out, const TensorView& residual, int num_threads, Interrupted interrupted) {
  const std::int64_t size = size_of(dtype_);
  // The result of attention as (batch..., length, heads, value_dim).
  const DType heads_dtype = layer_.output ? dtype_ : out.dtype;
  const TensorView rows{nullptr, heads_dtype, out.ndim, out.shape, out.strides};
  const BufferView heads(layer_.output ? heads_->data() : static_cast<char*>(out.data), heads_dtype, rows,
                         layer_.num_heads, layer_.value_dim);
  attach_out(problem_, heads.view);
  const Plan plan = make_plan(problem_, *layer_.kernels);
  const int threads = threads_for(plan, num_threads);

  const Norm* const inner = one_input() ? layer_.norm : nullptr;  // a context is not normalised
  const LinearJob inputs[] = {
      {layer_.query, RowsView(x_), query_.data(), dtype_, layer_.query.columns() * size, layer_.norm},
      {layer_.key, RowsView(context_), key_.data(), dtype_, layer_.key.columns() * size, inner},
      {layer_.value, RowsView(context_), value_.data(), dtype_, layer_.value.columns() * size, inner},
  };
  if (!run_all(inputs, 3, num_threads, interrupted)) return false;
  if (!normalise(layer_.query_norm, query_, num_threads, interrupted) ||
      !normalise(layer_.key_norm, key_, num_threads, interrupted))
    return false;
  if (layer_.rope && !rotate(num_threads, interrupted)) return false;
  if (step_) step_->store(*layer_.kernels, key_.view, value_.view);
  if (!attend(problem_, plan, threads, interrupted)) return false;
  if (!layer_.output) return true;
  const std::int64_t joined = layer_.num_heads * layer_.value_dim;
  const std::optional<RowsView> added = residual ? std::optional<RowsView>(residual) : std::nullopt;
  return run_normalised({.projection = *layer_.output,
                         .x = RowsView(heads.data(), dtype_, problem_.batch * problem_.q_len, joined),
                         .out = static_cast<char*>(out.data),
                         .out_dtype = out.dtype,
                         .out_stride = layer_.output->columns() * size_of(out.dtype),
                         .residual = added ? &*added : nullptr},
                        layer_.post_norm, num_threads, interrupted);
}

}  // namespace selfattn
