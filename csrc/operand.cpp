#include "operand.h"

#include <algorithm>

namespace selfattn {
namespace {

// Finds the view's batch axes, innermost first, and returns their number. Adjacent axes that one stride steps through
// become one axis. Axes with stride 0 are left out.
int find_axes(const Problem& problem, const TensorView& view, int trailing, BatchAxis* axes) {
  const std::span extents = problem.batch_shape.extents();
  const int ndim = static_cast<int>(extents.size()), missing = ndim - leading_axes(view, trailing);
  int count = 0;
  std::int64_t inside = 1;
  for (int axis = ndim - 1; axis >= 0 && problem.batch > 0; --axis) {
    const std::int64_t extent = extents[static_cast<std::size_t>(axis)];
    const std::int64_t stride = axis < missing || view.shape[axis - missing] == 1 ? 0 : view.strides[axis - missing];
    BatchAxis* last = count > 0 ? axes + count - 1 : nullptr;
    if (last && last->inside * last->extent == inside && last->stride * last->extent == stride)
      last->extent *= extent;
    else if (stride != 0)
      axes[count++] = {inside, extent, stride};
    inside *= extent;
  }
  return count;
}

Shape per_head_shape(const Problem& problem, std::int64_t length) {
  Shape shape(problem.batch_shape.extents());
  if (problem.ndim > 2) shape.append(problem.num_heads);
  shape.append(length);
  return shape;
}

}  // namespace

Axes trailing_axes(const TensorView& view, Layout layout) {
  if (view.ndim == 2) return {1, 0, view.extent(1), view.stride(1), view.extent(0), view.stride(0)};
  const int head = layout == Layout::bshd ? 1 : 2, row = 3 - head;
  return {view.extent(head), view.stride(head), view.extent(row), view.stride(row), view.extent(0), view.stride(0)};
}

int leading_axes(const TensorView& view, int trailing) { return std::max(view.ndim - trailing, 0); }

void place_batch(Problem& problem, Operand& operand, const TensorView& view, int trailing) {
  operand.data = static_cast<char*>(view.data);
  operand.dtype = view.dtype;
  BatchAxis axes[max_axes];
  const int count = find_axes(problem, view, trailing, axes);
  if (count == 1 && axes[0].inside == 1 && axes[0].extent == problem.batch) {
    operand.batch = axes[0].stride;
    return;
  }
  operand.first_axis = static_cast<int>(problem.batch_axes.size());
  operand.axes = static_cast<std::uint8_t>(count);
  problem.batch_axes.insert(problem.batch_axes.end(), axes, axes + count);
}

void place(Problem& problem, Operand& operand, const TensorView& view, const Axes& axes, std::int64_t page) {
  place_batch(problem, operand, view, 3);
  operand.head = axes.head_stride;
  operand.row = axes.row_stride;
  operand.column = axes.column_stride;
  operand.page = page;
  operand.in_place =
      are_in_place(view.data, view.dtype, operand.column, {operand.row, operand.head, operand.page, operand.batch});
  for (const BatchAxis& axis : problem.axes_of(operand))
    operand.in_place = operand.in_place && axis.stride % alignment_of(view.dtype) == 0;
}

bool are_in_place(const void* data, DType dtype, std::int64_t column, std::initializer_list<std::int64_t> strides) {
  const std::int64_t grid = alignment_of(dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(grid) == 0;
  for (const std::int64_t stride : strides) aligned = aligned && stride % grid == 0;
  return aligned && column == size_of(dtype);
}

Shape rows_shape(const Problem& problem, std::int64_t heads, std::int64_t length, std::int64_t dim) {
  Shape shape(problem.batch_shape.extents());
  const bool heads_last = problem.ndim > 2 && problem.layout == Layout::bshd;
  if (problem.ndim > 2) shape.append(heads_last ? length : heads);
  shape.append(heads_last ? heads : length);
  shape.append(dim);
  return shape;
}

Shape out_shape(const Problem& problem) {
  return rows_shape(problem, problem.num_heads, problem.q_len, problem.value_dim);
}

Shape lse_shape(const Problem& problem) { return per_head_shape(problem, problem.q_len); }

Shape key_mass_shape(const Problem& problem) { return per_head_shape(problem, problem.kv_len); }

Shape weights_shape(const Problem& problem) {
  Shape shape = lse_shape(problem);
  shape.append(problem.kv_len);
  return shape;
}

Operand place_rows(Problem& problem, const TensorView& view) {
  Operand operand;
  place(problem, operand, view, trailing_axes(view, problem.layout));
  return operand;
}

Operand place_per_row(Problem& problem, const TensorView& view) {
  Operand operand;
  place_batch(problem, operand, view, 2);
  operand.row = view.stride(0);
  operand.head = view.ndim > 1 ? view.stride(1) : 0;
  return operand;
}

Operand place_scores(Problem& problem, const TensorView& view) {
  Operand operand;
  place_batch(problem, operand, view, 3);
  const auto stride = [&](int axis) { return view.ndim > axis && view.extent(axis) != 1 ? view.stride(axis) : 0; };
  operand.column = stride(0);
  operand.row = stride(1);
  operand.head = problem.ndim > 2 ? stride(2) : 0;
  return operand;
}

void attach_out(Problem& problem, const TensorView& out) { problem.out = place_rows(problem, out); }

void attach_lse(Problem& problem, const TensorView& lse) { problem.lse = place_per_row(problem, lse); }

void attach_weights(Problem& problem, const TensorView& weights) {
  place(problem, problem.weights, weights, trailing_axes(weights, Layout::bhsd));
}

void attach_key_mass(Problem& problem, const TensorView& mass) { problem.key_mass = place_per_row(problem, mass); }

}  // namespace selfattn
