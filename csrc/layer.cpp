#include "layer.h"

#include <algorithm>
#include <cstring>

#include "attend.h"
#include "plan.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

// A view of a C-contiguous buffer with axes (batch..., length, heads, dim).
struct BufferView {
  std::int64_t shape[max_axes], strides[max_axes];
  TensorView view;

  BufferView(char* data, DType dtype, const TensorView& x, std::int64_t heads, std::int64_t dim) {
    view = {data, dtype, x.ndim + 1, shape, strides};
    std::copy_n(x.shape, x.ndim - 1, shape);
    shape[x.ndim - 1] = heads;
    shape[x.ndim] = dim;
    std::int64_t stride = size_of(dtype);
    for (int axis = x.ndim; axis >= 0; --axis) {
      strides[axis] = stride;
      stride *= shape[axis];
    }
  }
};

std::int64_t row_count(const TensorView& x) {
  std::int64_t rows = 1;
  for (int axis = 0; axis < x.ndim - 1; ++axis) rows *= x.shape[axis];
  return rows;
}

}  // namespace

struct LayerCall::State {
  const LayerWeights& layer;
  DType dtype;  // of the computation
  TensorView x, context, positions;
  std::int64_t query_rows, key_rows;
  std::int64_t query_bytes, key_bytes, value_bytes;
  Scratch inputs;  // queries, keys, values
  BufferView query, key, value;
  Problem problem;
  std::optional<Scratch> heads;  // attention's result, before the output projection

  State(const LayerWeights& weights, const TensorView& x_view, const TensorView& context_view,
        const TensorView& positions_view)
      : layer(weights),
        dtype(computed_in(weights.dtype)),
        x(x_view),
        context(context_view ? context_view : x_view),
        positions(positions_view),
        query_rows(row_count(x)),
        key_rows(row_count(context)),
        query_bytes(bytes_of(query_rows, weights.query.columns(), size_of(dtype))),
        key_bytes(bytes_of(key_rows, weights.key.columns(), size_of(dtype))),
        value_bytes(bytes_of(key_rows, weights.value.columns(), size_of(dtype))),
        inputs(static_cast<std::size_t>(query_bytes + key_bytes + value_bytes + 64)),
        query(inputs.data(), dtype, x, weights.num_heads, weights.head_dim),
        key(inputs.data() + query_bytes, dtype, context, weights.num_kv_heads, weights.head_dim),
        value(inputs.data() + query_bytes + key_bytes, dtype, context, weights.num_kv_heads,
              weights.value_dim) {}

  // Positions count along the rows of one sequence; where given, they belong to x and, without a context, to its keys.
  std::int64_t position_of(std::int64_t row, std::int64_t length, bool given) const {
    if (!given) return row % length;
    const char* p = static_cast<const char*>(positions.data);
    for (int axis = 0; axis < positions.ndim; ++axis) {  // right-aligned against (..., S)
      const std::int64_t extent = x.extent(axis + 1);
      if (positions.extent(axis) != 1) p += row % extent * positions.stride(axis);
      row /= extent;
    }
    std::int64_t position;
    std::memcpy(&position, p, sizeof position);
    return position;
  }

  bool rotate(int num_threads, Interrupted interrupted) const {
    const Rope& rope = *layer.rope;
    const bool one_input = context.data == x.data && context.shape == x.shape;
    const auto half = static_cast<std::size_t>(rope.rotary_dim / 2);
    const double flops = static_cast<double>(query_rows + key_rows) * static_cast<double>(rope.rotary_dim) * 100;
    const int threads = useful_threads(flops, 0, query_rows + key_rows, num_threads);
    const Scratch tables(static_cast<std::size_t>(threads) * 2 * half * sizeof(double));
    const auto turn = [&](const BufferView& buffer, std::int64_t row, std::int64_t position, double* cosines) {
      const TensorView& v = buffer.view;
      rope_tables(rope, position, cosines, cosines + half);
      for (std::int64_t head = 0; head < v.extent(1); ++head) {
        char* at = static_cast<char*>(v.data) + row * v.stride(2) + head * v.stride(1);
        rope_rotate(rope, dtype, layer.head_dim, cosines, cosines + half, at, v.stride(0), at, v.stride(0));
      }
    };
    TaskLoop loop(query_rows + key_rows, threads, interrupted);
    const auto body = [&](std::int64_t index, int slot) {
      double* cosines = reinterpret_cast<double*>(tables.data()) + static_cast<std::size_t>(slot) * 2 * half;
      const bool given = static_cast<bool>(positions);
      if (index < query_rows)
        turn(query, index, position_of(index, x.extent(1), given), cosines);
      else
        turn(key, index - query_rows, position_of(index - query_rows, context.extent(1), given && one_input), cosines);
    };
    return loop.run(body);
  }
};

LayerCall::LayerCall(const LayerWeights& layer, const TensorView& x, const TensorView& context,
                     const TensorView& positions, AttentionArguments arguments)
    : state_(std::make_unique<State>(layer, x, context, positions)) {
  arguments.q = state_->query.view;
  arguments.k = state_->key.view;
  arguments.v = state_->value.view;
  arguments.bshd = true;
  state_->problem = make_problem(arguments);
  if (layer.output) {
    const Problem& p = state_->problem;
    state_->heads.emplace(
        static_cast<std::size_t>(bytes_of(p.batch, p.q_len, layer.num_heads, layer.value_dim, size_of(state_->dtype))));
  }
}

LayerCall::~LayerCall() = default;

Problem& LayerCall::problem() { return state_->problem; }

Shape LayerCall::out_shape() const {
  Shape shape = selfattn::out_shape(state_->problem);
  --shape.ndim;  // heads and value_dim become one axis
  const LayerWeights& layer = state_->layer;
  shape.extent[shape.ndim - 1] = layer.output ? layer.output->columns() : layer.num_heads * layer.value_dim;
  return shape;
}

double LayerCall::flops() const {
  const State& s = *state_;
  const auto product = [](auto... sizes) { return (2.0 * ... * static_cast<double>(sizes)); };
  const Problem& p = s.problem;
  return product(s.query_rows, s.layer.query.depth(), s.layer.query.columns()) +
         product(s.key_rows, s.layer.key.depth(), s.layer.key.columns() + s.layer.value.columns()) +
         product(p.batch, p.num_heads, p.q_len, p.kv_len, p.head_dim + p.value_dim);
}

bool LayerCall::run(const TensorView& out, int num_threads, Interrupted interrupted) {
  State& s = *state_;
  const LayerWeights& layer = s.layer;
  Problem& problem = s.problem;
  const std::int64_t size = size_of(s.dtype);
  // The attention's result as (batch..., length, heads, value_dim).
  const DType heads_dtype = layer.output ? s.dtype : out.dtype;
  const TensorView rows{nullptr, heads_dtype, out.ndim, out.shape, out.strides};
  const BufferView heads(layer.output ? s.heads->data() : static_cast<char*>(out.data), heads_dtype, rows,
                         layer.num_heads, layer.value_dim);
  attach_out(problem, heads.view);
  const Plan plan = make_plan(problem, *layer.kernels, num_threads);

  const auto buffer = [](const BufferView& b) { return static_cast<char*>(b.view.data); };
  const ProjectionJob inputs[] = {
      {layer.query, RowsView(s.x), buffer(s.query), s.dtype, layer.query.columns() * size},
      {layer.key, RowsView(s.context), buffer(s.key), s.dtype, layer.key.columns() * size},
      {layer.value, RowsView(s.context), buffer(s.value), s.dtype, layer.value.columns() * size},
  };
  if (!project_all(inputs, 3, num_threads, interrupted)) return false;
  if (layer.rope && !s.rotate(num_threads, interrupted)) return false;
  if (!attend(problem, plan, interrupted)) return false;
  if (!layer.output) return true;
  const std::int64_t joined = layer.num_heads * layer.value_dim * size;
  const std::int64_t shape[] = {problem.batch * problem.q_len, layer.num_heads * layer.value_dim};
  const std::int64_t strides[] = {joined, size};
  const ProjectionJob output{*layer.output, RowsView({buffer(heads), s.dtype, 2, shape, strides}),
                             static_cast<char*>(out.data), out.dtype, layer.output->columns() * size_of(out.dtype)};
  return project_all(&output, 1, num_threads, interrupted);
}

}  // namespace selfattn
