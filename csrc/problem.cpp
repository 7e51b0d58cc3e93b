#include "problem.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>

#include "arithmetic.h"
#include "message.h"

namespace selfattn {
namespace {

// The largest width that is accepted. Broadcast views can claim any width; up to this one, no scratch size overflows.
constexpr std::int64_t widest = (std::int64_t{1} << 31) - 1;

// The most elements that a result may have: more than any machine can address. Up to this number, no count of tasks and
// no size overflows.
constexpr std::int64_t most_elements = std::int64_t{1} << 47;

// The last three axes of q, k, v and out; a 2-D array has one head.
struct Axes {
  std::int64_t heads, head_stride, length, row_stride, dim, column_stride;
};

Axes trailing_axes(const TensorView& view, Layout layout) {
  if (view.ndim == 2) return {1, 0, view.extent(1), view.stride(1), view.extent(0), view.stride(0)};
  const int head = layout == Layout::bshd ? 1 : 2, row = 3 - head;
  return {view.extent(head), view.stride(head), view.extent(row), view.stride(row), view.extent(0), view.stride(0)};
}

int leading_axes(const TensorView& view, int trailing) { return std::max(view.ndim - trailing, 0); }

// Sets the operand's data, type and batch strides. The view's leading axes are right-aligned with the problem's batch
// axes.
void place_batch(const Problem& problem, Operand& operand, const TensorView& view, int trailing) {
  operand.data = static_cast<char*>(view.data);
  operand.dtype = view.dtype;
  const int missing = problem.batch_axes - leading_axes(view, trailing);
  for (int axis = 0; axis < problem.batch_axes; ++axis)
    operand.batch[axis] = axis < missing || view.shape[axis - missing] == 1 ? 0 : view.strides[axis - missing];
}

void place(const Problem& problem, Operand& operand, const TensorView& view, const Axes& axes) {
  place_batch(problem, operand, view, 3);
  operand.head = axes.head_stride;
  operand.row = axes.row_stride;
  operand.column = axes.column_stride;
}

void broadcast_batch(Problem& problem, const AttentionArguments& arguments) {
  const struct {
    const char* name;
    const TensorView& view;
  } operands[] = {{"q", arguments.q}, {"k", arguments.k}, {"v", arguments.v}};
  problem.batch_axes = std::max(problem.ndim - 3, 0);
  for (int axis = 0; axis < problem.batch_axes; ++axis) problem.batch_shape[axis] = 1;
  for (const auto& [name, view] : operands) {
    const int leading = leading_axes(view, 3);
    assert(leading <= problem.batch_axes);
    for (int i = 0; i < leading; ++i) {
      std::int64_t& extent = problem.batch_shape[problem.batch_axes - leading + i];
      if (view.shape[i] == 1 || view.shape[i] == extent) continue;
      if (extent != 1)
        refuse(arguments.function, "the leading dimensions ", to_text(view.shape, leading), " of ", name,
               " do not broadcast against ", to_text(problem.batch_shape, problem.batch_axes));
      extent = view.shape[i];
    }
  }
  for (int axis = 0; axis < problem.batch_axes; ++axis)
    if (__builtin_mul_overflow(problem.batch, problem.batch_shape[axis], &problem.batch))
      refuse(arguments.function, "the leading dimensions ", to_text(problem.batch_shape, problem.batch_axes),
             " have too many entries");
}

// An extent of 0 counts as 1, because empty results have rows, too.
void check_size(const Problem& problem, const char* function) {
  std::int64_t elements = 1;
  bool fits = true;
  for (const std::int64_t n : {problem.batch, problem.num_heads, problem.q_len, problem.value_dim + 1})
    fits = fits && !__builtin_mul_overflow(elements, std::max<std::int64_t>(n, 1), &elements);
  if (fits && elements <= most_elements) return;
  const Shape shape = out_shape(problem);
  refuse(function, "the result of shape ", to_text(shape.extent, shape.ndim), " is more than any memory holds");
}

void check_rank(const AttentionArguments& arguments, const char* name, const TensorView& view) {
  if (view.ndim < 2)
    refuse(arguments.function, name, " has shape ", shape_text(view), " but needs at least 2 dimensions ",
           arguments.layout == Layout::bshd ? "(..., sequence, heads, head_dim)" : "(..., heads, sequence, head_dim)");
}

void set_shapes(Problem& problem, const AttentionArguments& a) {
  check_rank(a, "q", a.q);
  const Axes q = trailing_axes(a.q, a.layout);
  if (q.dim == 0) refuse(a.function, "q has head_dim 0, but the softmax scale needs head_dim >= 1");
  if (q.dim > widest) refuse(a.function, "q has head_dim ", q.dim, ", but at most ", widest, " is possible");
  check_rank(a, "k", a.k);
  const Axes k = trailing_axes(a.k, a.layout);
  if (k.dim != q.dim) refuse(a.function, "k has head_dim ", k.dim, " but q has ", q.dim);
  if (k.heads == 0 ? q.heads != 0 : q.heads % k.heads != 0)
    refuse(a.function, "q has ", q.heads, " heads, which is not a multiple of the ", k.heads, " heads of k");
  check_rank(a, "v", a.v);
  const Axes v = trailing_axes(a.v, a.layout);
  if (v.heads != k.heads) refuse(a.function, "v has ", v.heads, " heads but k has ", k.heads);
  if (v.length != k.length) refuse(a.function, "v has length ", v.length, " but k has ", k.length);
  if (v.dim > widest) refuse(a.function, "v has head_dim ", v.dim, ", but at most ", widest, " is possible");
  problem.ndim = std::max({a.q.ndim, a.k.ndim, a.v.ndim});
  broadcast_batch(problem, a);
  problem.num_heads = q.heads;
  problem.num_kv_heads = k.heads;
  problem.group_size = k.heads == 0 ? 0 : q.heads / k.heads;
  problem.q_len = q.length;
  problem.kv_len = k.length;
  problem.head_dim = q.dim;
  problem.value_dim = v.dim;
  check_size(problem, a.function);
  place(problem, problem.query, a.q, q);
  place(problem, problem.key, a.k, k);
  place(problem, problem.value, a.v, v);
  problem.pages = a.pages;
  problem.key.page = a.key_page;
  problem.value.page = a.value_page;
}

// The cache has allocated the scales itself, so their shapes need no check.
void place_scales(Problem& problem, Operand& operand, const TensorView& view, std::int64_t page) {
  if (!view) return;
  place_batch(problem, operand, view, 2);
  operand.head = view.stride(1);
  operand.row = view.stride(0);
  operand.page = page;
}

// Checks that an argument broadcasts to `target`, right-aligned, without extending it.
void check_broadcast(const char* function, const char* name, const TensorView& view, const Shape& target) {
  bool fits = view.ndim <= target.ndim;
  for (int i = 0; fits && i < view.ndim; ++i)
    fits = view.extent(i) == 1 || view.extent(i) == target.extent[target.ndim - 1 - i];
  if (!fits)
    refuse(function, name, " has shape ", shape_text(view), ", which does not broadcast to ",
           to_text(target.extent, target.ndim));
}

// For mask and bias: they broadcast to (..., num_heads, q_len, keys).
void place_score_operand(Problem& problem, Operand& operand, const char* function, const char* name,
                         const TensorView& view, std::int64_t keys) {
  if (!view) return;
  Shape scores = weights_shape(problem);
  scores.extent[scores.ndim - 1] = keys;
  check_broadcast(function, name, view, scores);
  operand = place_scores(problem, view);
}

// For lengths and offsets: one integer per batch entry.
void place_per_batch(Problem& problem, Operand& operand, const char* function, const char* name,
                     const TensorView& view) {
  if (!view) return;
  Shape target;
  for (int axis = 0; axis < problem.batch_axes; ++axis) target.append(problem.batch_shape[axis]);
  if (target.ndim == 0) target.append(1);
  check_broadcast(function, name, view, target);
  place_batch(problem, operand, view, 0);
  if (problem.batch_axes == 0) operand.data = static_cast<char*>(view.data);
}

// Calls use(number) for each integer in `operand`, recursively: `data` points to those along the axes from `axis` on.
template <class Use>
void each_number(const Problem& problem, const Operand& operand, const Use& use, const char* data, int axis = 0) {
  if (axis == problem.batch_axes) return use(integer_at(data));
  // A broadcast axis may have any extent, but holds only one number.
  const std::int64_t extent = operand.batch[axis] == 0 ? 1 : problem.batch_shape[axis];
  for (std::int64_t i = 0; i < extent; ++i)
    each_number(problem, operand, use, data + i * operand.batch[axis], axis + 1);
}

void check_lengths(const Problem& problem, const Operand& operand, const char* function, const char* name,
                   std::int64_t limit, const char* limit_name) {
  if (!operand || problem.batch == 0) return;
  const auto check = [&](std::int64_t length) {
    if (length < 0 || length > limit)
      refuse(function, name, " holds ", length, ", which is outside 0..", limit, " (", limit_name, ")");
  };
  each_number(problem, operand, check, operand.data);
}

bool depends_on_positions(const AttentionArguments& a) {
  return a.causal || a.window_left >= 0 || a.window_right >= 0 || a.alibi_slopes || a.distance_bias || a.r;
}

// Fewer keys than queries nearly always mean a right-padded batch. Aligning the last of all queries with the last valid
// key would silently shift such an entry.
void check_alignment(const Problem& problem, const AttentionArguments& a) {
  if (!problem.kv_lens || problem.q_lens || problem.q_offset || a.keys == Keys::cached || problem.batch == 0) return;
  if (!depends_on_positions(a)) return;
  const auto check = [&](std::int64_t length) {
    if (length < problem.q_len)
      refuse(a.function, "kv_lens holds ", length, ", which is less than the ", problem.q_len,
             " queries of q, so that it is unclear where they are: pass q_lens as well for padded queries, or "
             "q_offset, the position of the first query");
  };
  each_number(problem, problem.kv_lens, check, problem.kv_lens.data);
}

void place_per_head(Problem& problem, const AttentionArguments& a) {
  if (a.alibi_slopes) {
    Shape target;
    for (int axis = 0; axis < problem.batch_axes; ++axis) target.append(problem.batch_shape[axis]);
    target.append(problem.num_heads);
    check_broadcast(a.function, "alibi_slopes", a.alibi_slopes, target);
    place_batch(problem, problem.alibi_slopes, a.alibi_slopes, 1);
    if (a.alibi_slopes.ndim > 0 && a.alibi_slopes.extent(0) != 1) problem.alibi_slopes.head = a.alibi_slopes.stride(0);
  }
  if (a.sinks) {
    if (a.sinks.ndim != 1 || a.sinks.extent(0) != problem.num_heads)
      refuse(a.function, "sinks has shape ", shape_text(a.sinks), " but needs one logit per head: (", problem.num_heads,
             ",)");
    place_batch(problem, problem.sinks, a.sinks, 1);
    problem.sinks.head = a.sinks.stride(0);
  }
}

void place_relative(Problem& problem, const AttentionArguments& a) {
  if (!a.r) return;
  if (a.r.ndim < 2 || a.r.ndim > 3 || a.r.extent(0) != problem.head_dim || a.r.extent(1) < 1 ||
      (a.r.ndim == 3 && a.r.extent(2) != problem.num_heads))
    refuse(a.function, "r has shape ", shape_text(a.r), ", but (", problem.num_heads, ", R, ", problem.head_dim,
           ") or (R, ", problem.head_dim, ") is needed, with R at least 1");
  const struct {
    const char* name;
    const TensorView& view;
    PerHead& operand;
  } biases[] = {{"u", a.u, problem.key_bias}, {"w", a.w, problem.relative_bias}};
  for (const auto& [name, view, operand] : biases) {
    if (view.ndim != 2 || view.extent(1) != problem.num_heads || view.extent(0) != problem.head_dim)
      refuse(a.function, name, " has shape ", shape_text(view), ", but (", problem.num_heads, ", ", problem.head_dim,
             ") is needed");
    operand = {static_cast<const char*>(view.data), view.dtype, view.stride(1), 0, view.stride(0)};
  }
  const std::int64_t head = a.r.ndim == 3 ? a.r.stride(2) : 0;
  problem.relative.rows = {static_cast<const char*>(a.r.data), a.r.dtype, head, a.r.stride(1), a.r.stride(0)};
  problem.relative.count = a.r.extent(1);
  problem.relative.origin = a.r_origin;
  if (a.r_origin < 0 || a.r_origin >= problem.relative.count)
    refuse(a.function, "r_origin is ", a.r_origin, ", but r has the rows 0 to ", problem.relative.count - 1);
}

void place_distance_bias(Problem& problem, const AttentionArguments& a) {
  const TensorView& view = a.distance_bias;
  if (!view) return;
  if (view.extent(1) != problem.num_heads)
    refuse(a.function, "t5 has a table for ", view.extent(1), " heads, but q has ", problem.num_heads);
  problem.distance_bias.rows = {static_cast<const char*>(view.data), view.dtype, view.stride(1), view.stride(0), 0};
  problem.distance_bias.count = view.extent(0);
  problem.distance_bias.origin = a.distance_origin;
}

Shape with_batch(const Problem& problem) {
  Shape shape;
  for (int axis = 0; axis < problem.batch_axes; ++axis) shape.append(problem.batch_shape[axis]);
  return shape;
}

}  // namespace

// The first factor of a score is the scale in units of log2, or scale / softcap. If it were not finite in the type of
// computation, every product of 0 would become NaN.
void check_scale(const AttentionArguments& a, const Problem& problem) {
  const double most = problem.dtype == DType::f32 ? static_cast<double>(std::numeric_limits<float>::max())
                                                  : std::numeric_limits<double>::max();
  if (std::abs(problem.scale) > most / log2_e)
    refuse(a.function, "scale is ", problem.scale, ", but its size must not exceed ", most / log2_e);
  if (problem.softcap != 0 && std::abs(problem.scale) / problem.softcap > most)
    refuse(a.function, "softcap is ", problem.softcap, ", but scale / softcap must not exceed ", most);
}

Problem make_problem(const AttentionArguments& a) {
  Problem problem;
  problem.dtype = computed_in(a.q.dtype);
  problem.layout = a.layout;
  set_shapes(problem, a);
  place_scales(problem, problem.key_scales, a.key_scales, a.key_scale_page);
  place_scales(problem, problem.value_scales, a.value_scales, a.value_scale_page);
  problem.recent_mask = a.recent_mask;
  place_score_operand(problem, problem.mask, a.function, "mask", a.mask,
                      a.recent_mask ? problem.q_len : problem.kv_len);
  place_score_operand(problem, problem.bias, a.function, "bias", a.bias, problem.kv_len);
  problem.causal = a.causal;
  place_per_batch(problem, problem.q_offset, a.function, "q_offset", a.q_offset);
  problem.window_left = a.window_left;
  problem.window_right = a.window_right;
  place_per_batch(problem, problem.q_lens, a.function, "q_lens", a.q_lens);
  check_lengths(problem, problem.q_lens, a.function, "q_lens", problem.q_len, "the length of q");
  place_per_batch(problem, problem.kv_lens, a.function, "kv_lens", a.kv_lens);
  check_lengths(problem, problem.kv_lens, a.function, "kv_lens", problem.kv_len, "the length of k");
  if (a.keys == Keys::same_tokens && !problem.q_lens) problem.q_lens = problem.kv_lens;
  check_alignment(problem, a);
  place_per_batch(problem, problem.kv_starts, a.function, "kv_starts", a.kv_starts);
  check_lengths(problem, problem.kv_starts, a.function, "kv_starts", problem.kv_len, "the length of k");
  problem.scale = a.scale ? *a.scale : 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
  problem.softcap = a.softcap;
  problem.precision = a.precision;
  problem.dropout = a.dropout;
  problem.seed = a.seed;
  problem.first_entry = a.first_entry;
  check_scale(a, problem);
  place_per_head(problem, a);
  place_relative(problem, a);
  place_distance_bias(problem, a);
  return problem;
}

Shape rows_shape(const Problem& problem, std::int64_t heads, std::int64_t length, std::int64_t dim) {
  Shape shape = with_batch(problem);
  const bool heads_last = problem.ndim > 2 && problem.layout == Layout::bshd;
  if (problem.ndim > 2) shape.append(heads_last ? length : heads);
  shape.append(heads_last ? heads : length);
  shape.append(dim);
  return shape;
}

Shape out_shape(const Problem& problem) {
  return rows_shape(problem, problem.num_heads, problem.q_len, problem.value_dim);
}

Shape lse_shape(const Problem& problem) {
  Shape shape = with_batch(problem);
  if (problem.ndim > 2) shape.append(problem.num_heads);
  shape.append(problem.q_len);
  return shape;
}

Shape weights_shape(const Problem& problem) {
  Shape shape = lse_shape(problem);
  shape.append(problem.kv_len);
  return shape;
}

Operand place_rows(const Problem& problem, const TensorView& view) {
  Operand operand;
  place(problem, operand, view, trailing_axes(view, problem.layout));
  return operand;
}

Operand place_per_row(const Problem& problem, const TensorView& view) {
  Operand operand;
  place_batch(problem, operand, view, 2);
  operand.row = view.stride(0);
  operand.head = view.ndim > 1 ? view.stride(1) : 0;
  return operand;
}

Operand place_scores(const Problem& problem, const TensorView& view) {
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

}  // namespace selfattn
