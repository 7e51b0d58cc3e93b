#include "problem.h"

#include <algorithm>
#include <cmath>

#include "arithmetic.h"
#include "distance_operands.h"
#include "message.h"
#include "operand.h"

namespace selfattn {
namespace {

// The largest width that is accepted. Broadcast views can claim any width; up to this one, no scratch size overflows.
constexpr std::int64_t widest = (std::int64_t{1} << 31) - 1;

// The longest chunk of keys. With it, no position of a chunk's end overflows.
constexpr std::int64_t most_chunk = std::int64_t{1} << 60;

// The most elements that a result may have: more than any machine can address. Up to this number, no count of tasks and
// no size overflows.
constexpr std::int64_t most_in_result = std::int64_t{1} << 47;

void broadcast_batch(Problem& problem, const AttentionArguments& arguments) {
  const struct {
    const char* name;
    const TensorView& view;
  } operands[] = {{"q", arguments.q}, {"k", arguments.k}, {"v", arguments.v}};
  Shape shape;
  shape.ndim = std::max(problem.ndim - 3, 0);
  std::fill_n(shape.extent, shape.ndim, 1);
  for (const auto& [name, view] : operands) {
    const int leading = leading_axes(view, 3),
              missing = std::max(shape.ndim - leading, 0);  // never less than 0: ndim is the largest
    for (int i = 0; i < leading; ++i) {
      std::int64_t& extent = shape.extent[missing + i];
      if (view.shape[i] == 1 || view.shape[i] == extent) continue;
      if (extent != 1)
        refuse(arguments.function, "the leading dimensions ", to_text(view.shape, leading), " of ", Argument{name},
               " do not broadcast against ", to_text(shape.extent, shape.ndim));
      extent = view.shape[i];
    }
  }
  problem.batch_shape.assign(shape.extents());
  for (int axis = 0; axis < shape.ndim; ++axis)
    if (__builtin_mul_overflow(problem.batch, shape.extent[axis], &problem.batch))
      refuse(arguments.function, "the leading dimensions ", to_text(shape.extent, shape.ndim),
             " have too many entries");
}

// An extent of 0 counts as 1: sizes are computed from the other extents even if the result is empty.
void check_size(const Problem& problem, const char* function) {
  std::int64_t elements = 1;
  bool fits = true;
  for (const std::int64_t n : {problem.batch, problem.num_heads, problem.q_len, problem.value_dim + 1})
    fits = fits && !__builtin_mul_overflow(elements, std::max<std::int64_t>(n, 1), &elements);
  if (fits && elements <= most_in_result) return;
  const Shape shape = out_shape(problem);
  refuse(function, "the result would have shape ", to_text(shape.extent, shape.ndim),
         ", which is larger than any memory");
}

void check_rank(const AttentionArguments& arguments, const char* name, const TensorView& view) {
  if (view.ndim < 2)
    refuse(arguments.function, Argument{name}, " has shape ", shape_text(view), " but needs at least 2 dimensions ",
           arguments.layout == Layout::bshd ? "(..., sequence, heads, head_dim)" : "(..., heads, sequence, head_dim)");
}

void set_shapes(Problem& problem, const AttentionArguments& a) {
  check_rank(a, "q", a.q);
  const Axes q = trailing_axes(a.q, a.layout);
  if (q.dim == 0) refuse(a.function, "q"_arg, " has head_dim 0, but the softmax scale needs head_dim >= 1");
  if (q.dim > widest) refuse(a.function, "q"_arg, " has head_dim ", q.dim, ", but at most ", widest, " is possible");
  check_rank(a, "k", a.k);
  const Axes k = trailing_axes(a.k, a.layout);
  if (k.dim != q.dim) refuse(a.function, "k"_arg, " has head_dim ", k.dim, " but ", "q"_arg, " has ", q.dim);
  if (k.heads == 0 ? q.heads != 0 : q.heads % k.heads != 0)
    refuse(a.function, "q"_arg, " has ", q.heads, " heads, which is not a multiple of the ", k.heads, " heads of ",
           "k"_arg);
  check_rank(a, "v", a.v);
  const Axes v = trailing_axes(a.v, a.layout);
  if (v.heads != k.heads) refuse(a.function, "v"_arg, " has ", v.heads, " heads but ", "k"_arg, " has ", k.heads);
  if (v.length != k.length) refuse(a.function, "v"_arg, " has length ", v.length, " but ", "k"_arg, " has ", k.length);
  if (v.dim > widest) refuse(a.function, "v"_arg, " has head_dim ", v.dim, ", but at most ", widest, " is possible");
  problem.ndim = std::max({a.q.ndim, a.k.ndim, a.v.ndim});
  broadcast_batch(problem, a);
  problem.num_heads = q.heads;
  problem.num_kv_heads = k.heads;
  problem.group_size = k.heads == 0 ? 0 : q.heads / k.heads;
  problem.q_len = q.length;
  const auto [first, kv_len] = a.piece.value_or(Piece{0, k.length});
  problem.kv_len = kv_len;
  problem.held = {first, first + k.length};
  problem.head_dim = q.dim;
  problem.value_dim = v.dim;
  check_size(problem, a.function);
  place(problem, problem.query, a.q, q);
  place(problem, problem.key, a.k, k, a.key_page);
  place(problem, problem.value, a.v, v, a.value_page);
  problem.pages = a.pages;
}

// The cache has allocated the scales itself, so their shapes need no check.
void place_scales(Problem& problem, Operand& operand, const TensorView& view, std::int64_t page) {
  if (!view) return;
  place_batch(problem, operand, view, 2);
  operand.head = view.stride(1);
  operand.row = view.stride(0);
  operand.page = page;
}

// Checks that an argument broadcasts to the shape `target`: right-aligned, and without changing `target`.
void check_broadcast(const char* function, const char* name, const TensorView& view, const Shape& target) {
  bool fits = view.ndim <= target.ndim;
  for (int i = 0; fits && i < view.ndim; ++i)
    fits = view.extent(i) == 1 || view.extent(i) == target.extent[target.ndim - 1 - i];
  if (!fits)
    refuse(function, Argument{name}, " has shape ", shape_text(view), ", which does not broadcast to ",
           to_text(target.extent, target.ndim));
}

// Places a mask or a bias, which broadcasts to (..., num_heads, q_len, keys).
void place_score_operand(Problem& problem, Operand& operand, const char* function, const char* name,
                         const TensorView& view, std::int64_t keys) {
  if (!view) return;
  Shape scores = weights_shape(problem);
  scores.extent[scores.ndim - 1] = keys;
  check_broadcast(function, name, view, scores);
  operand = place_scores(problem, view);
  // Kernels need the address of key 0, which a piece need not hold. This address may be outside the array, so it is
  // computed with integers.
  const auto before = static_cast<std::uint64_t>(problem.held.begin) * static_cast<std::uint64_t>(operand.column);
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(operand.data) - before;
  operand.data = reinterpret_cast<char*>(start);  // NOLINT(performance-no-int-to-ptr)
}

// Places lengths or offsets: one integer per batch entry.
void place_per_batch(Problem& problem, Operand& operand, const char* function, const char* name,
                     const TensorView& view) {
  if (!view) return;
  Shape target(problem.batch_shape.extents());
  if (target.ndim == 0) target.append(1);
  check_broadcast(function, name, view, target);
  place_batch(problem, operand, view, 0);
}

// Calls use(number) for each integer along the axes from `data` on.
template <class Use>
void each_number(std::span<const BatchAxis> axes, const char* data, const Use& use) {
  if (axes.empty()) return use(integer_at(data));
  const auto [inside, extent, stride] = axes.back();
  for (std::int64_t i = 0; i < extent; ++i) each_number(axes.first(axes.size() - 1), data + i * stride, use);
}

// Calls use(number) for each integer of an operand. Batch entries may share an integer; it is visited once, because a
// broadcast operand may have any number of entries.
template <class Use>
void each_number(const Problem& problem, const Operand& operand, const Use& use) {
  const BatchAxis even{1, operand.batch == 0 ? 1 : problem.batch, operand.batch};
  each_number(operand.axes == 0 ? std::span(&even, 1) : problem.axes_of(operand), operand.data, use);
}

void check_lengths(const Problem& problem, const Operand& operand, const char* function, const char* name,
                   std::int64_t limit, const char* limited_by) {
  if (!operand || problem.batch == 0) return;
  const auto check = [&](std::int64_t length) {
    if (length < 0 || length > limit)
      refuse(function, Argument{name}, " holds ", length, ", which is outside 0..", limit, " (the length of ",
             Argument{limited_by}, ")");
  };
  each_number(problem, operand, check);
}

bool depends_on_positions(const AttentionArguments& a) {
  return a.causal || a.chunk != 0 || a.window_left >= 0 || a.window_right >= 0 || a.alibi_slopes || a.distance_bias ||
         a.r;
}

// An entry with fewer valid keys than queries nearly always comes from a right-padded batch. Aligning its last query,
// which is padding, with its last valid key would silently shift its positions.
void check_alignment(const Problem& problem, const AttentionArguments& a) {
  if (!problem.kv_lens || problem.q_lens || problem.q_offset || a.cached || problem.batch == 0) return;
  if (!depends_on_positions(a)) return;
  const auto check = [&](std::int64_t length) {
    if (length < problem.q_len)
      refuse(a.function, "kv_lens"_arg, " holds ", length, ", which is less than the ", problem.q_len, " queries of ",
             "q"_arg, ", so their positions are unclear: pass ", "q_lens"_arg, " as well for padded queries, or ",
             "q_offset"_arg, ", the position of the first query");
  };
  each_number(problem, problem.kv_lens, check);
}

// With a limit to the left, the visible keys of a query would no longer be adjacent.
void check_prefix(const AttentionArguments& a) {
  if (!a.prefix_lens) return;
  if (a.window_left >= 0)
    refuse(a.function, "prefix_lens"_arg, " cannot be used with a ", "window"_arg, " to the left");
  if (a.chunk != 0) refuse(a.function, "prefix_lens"_arg, " cannot be used with ", "chunk"_arg);
}

void place_per_head(Problem& problem, const AttentionArguments& a) {
  if (a.alibi_slopes) {
    Shape target(problem.batch_shape.extents());
    target.append(problem.num_heads);
    check_broadcast(a.function, "alibi_slopes", a.alibi_slopes, target);
    place_batch(problem, problem.alibi_slopes, a.alibi_slopes, 1);
    if (a.alibi_slopes.ndim > 0 && a.alibi_slopes.extent(0) != 1) problem.alibi_slopes.head = a.alibi_slopes.stride(0);
  }
  if (a.sinks) {
    if (a.sinks.ndim != 1 || a.sinks.extent(0) != problem.num_heads)
      refuse(a.function, "sinks"_arg, " has shape ", shape_text(a.sinks), " but needs one logit per head: (",
             problem.num_heads, ",)");
    place_batch(problem, problem.sinks, a.sinks, 1);
    problem.sinks.head = a.sinks.stride(0);
  }
}

// Kernels first multiply a product by scale * log2(e), or by scale / softcap. If this factor were not finite in the
// type of computation, every product that is 0 would become NaN. The numbers that a caller passes may be NaN. The
// first condition on each number has the form !(valid), which refuses NaN, because NaN fails every comparison.
void check_numbers(const AttentionArguments& a, const Problem& problem) {
  const double most = largest_number(problem.dtype);
  if (!(std::abs(problem.scale) <= most / log2_e))
    refuse(a.function, "scale"_arg, " is ", problem.scale, ", but its absolute value must not exceed ", most / log2_e);
  if (a.softcap && !(*a.softcap > 0 && std::isfinite(*a.softcap)))
    refuse(a.function, "softcap"_arg, " is ", *a.softcap, ", but it must be greater than 0 and finite");
  if (problem.softcap != 0 && std::abs(problem.scale) / problem.softcap > most)
    refuse(a.function, "softcap"_arg, " is ", problem.softcap, ", but ", "scale"_arg, " / ", "softcap"_arg,
           " must not exceed ", most);
  if (problem.chunk < 0 || problem.chunk > most_chunk)
    refuse(a.function, "chunk"_arg, " is ", problem.chunk, ", but it must be in 1..", most_chunk);
  if (!(problem.dropout >= 0 && problem.dropout < 1))
    refuse(a.function, "dropout"_arg, " is ", problem.dropout, ", but it must be at least 0 and less than 1");
}

}  // namespace

Problem make_problem(const AttentionArguments& a) {
  Problem problem;
  static_cast<Settings&>(problem) = a;
  problem.dtype = computed_in(a.q.dtype);
  set_shapes(problem, a);
  place_scales(problem, problem.key_scales, a.key_scales, a.key_scale_page);
  place_scales(problem, problem.value_scales, a.value_scales, a.value_scale_page);
  problem.recent_mask = a.recent_mask;
  place_score_operand(problem, problem.mask, a.function, "mask", a.mask,
                      a.recent_mask ? problem.q_len : problem.held_keys());
  place_score_operand(problem, problem.bias, a.function, "bias", a.bias, problem.held_keys());
  place_per_batch(problem, problem.q_offset, a.function, "q_offset", a.q_offset);
  place_per_batch(problem, problem.q_lens, a.function, "q_lens", a.q_lens);
  check_lengths(problem, problem.q_lens, a.function, "q_lens", problem.q_len, "q");
  place_per_batch(problem, problem.kv_lens, a.function, "kv_lens", a.kv_lens);
  // CacheStep has checked the lengths and starts of a cache.
  if (!a.cached) check_lengths(problem, problem.kv_lens, a.function, "kv_lens", problem.kv_len, "k");
  if (a.same_tokens && !problem.q_lens) problem.q_lens = problem.kv_lens;
  check_alignment(problem, a);
  place_per_batch(problem, problem.kv_starts, a.function, "kv_starts", a.kv_starts);
  if (!a.cached) check_lengths(problem, problem.kv_starts, a.function, "kv_starts", problem.kv_len, "k");
  place_per_batch(problem, problem.prefix_lens, a.function, "prefix_lens", a.prefix_lens);
  check_lengths(problem, problem.prefix_lens, a.function, "prefix_lens", problem.kv_len, "k");
  check_prefix(a);
  problem.scale = a.scale ? *a.scale : 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
  problem.softcap = a.softcap.value_or(0);
  check_numbers(a, problem);
  place_per_head(problem, a);
  place_relative(problem, a);
  place_distance_bias(problem, a);
  problem.out.dtype = a.q.dtype;
  problem.out.in_place = true;
  return problem;
}

}  // namespace selfattn
