#include "distance_operands.h"

#include "message.h"
#include "operand.h"

namespace selfattn {

void place_relative(Problem& problem, const AttentionArguments& a) {
  if (!a.r) return;
  if (a.r.ndim < 2 || a.r.ndim > 3 || a.r.extent(0) != problem.head_dim || a.r.extent(1) < 1 ||
      (a.r.ndim == 3 && a.r.extent(2) != problem.num_heads))
    refuse(a.function, "r"_arg, " has shape ", shape_text(a.r), ", but (", problem.num_heads, ", R, ", problem.head_dim,
           ") or (R, ", problem.head_dim, ") is needed, with R at least 1");
  const struct {
    const char* name;
    const TensorView& view;
    PerHead& operand;
  } biases[] = {{"u", a.u, problem.key_bias}, {"w", a.w, problem.relative_bias}};
  for (const auto& [name, view, operand] : biases) {
    if (view.ndim != 2 || view.extent(1) != problem.num_heads || view.extent(0) != problem.head_dim)
      refuse(a.function, Argument{name}, " has shape ", shape_text(view), ", but (", problem.num_heads, ", ",
             problem.head_dim, ") is needed");
    operand = {static_cast<const char*>(view.data), view.dtype, view.stride(1), 0, view.stride(0)};
  }
  const std::int64_t head = a.r.ndim == 3 ? a.r.stride(2) : 0;
  problem.relative.rows = {static_cast<const char*>(a.r.data), a.r.dtype, head, a.r.stride(1), a.r.stride(0)};
  problem.relative.rows.in_place = are_in_place(a.r.data, a.r.dtype, a.r.stride(0), {head, a.r.stride(1)});
  problem.relative.count = a.r.extent(1);
  problem.relative.origin = a.r_origin;
  if (a.r_origin < 0 || a.r_origin >= problem.relative.count)
    refuse(a.function, "r_origin"_arg, " is ", a.r_origin, ", but ", "r"_arg, " has the rows 0 to ",
           problem.relative.count - 1);
}

void place_distance_bias(Problem& problem, const AttentionArguments& a) {
  const TensorView& view = a.distance_bias;
  if (!view) return;
  if (view.ndim != 2 || view.extent(0) < 1)
    refuse(a.function, "t5"_arg, " has a table of shape ", shape_text(view), ", but (heads, distances) is needed");
  if (view.extent(1) != problem.num_heads)
    refuse(a.function, "t5"_arg, " has a table for ", view.extent(1), " heads, but ", "q"_arg, " has ",
           problem.num_heads);
  const std::int64_t count = view.extent(0), origin = a.distance_origin;
  if (origin < 0 || origin >= count)
    refuse(a.function, "t5"_arg, " has distance 0 in column ", origin, ", but its table has ", count, " columns");
  const PerHead rows{static_cast<const char*>(view.data), view.dtype, view.stride(1), view.stride(0), 0};
  problem.distance_bias = {rows, count, origin};
}

}  // namespace selfattn
