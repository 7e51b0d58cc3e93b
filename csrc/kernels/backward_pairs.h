// The backward pass with dot products of bfloat16 pairs (backward_units.h defines the interface). Queries, keys, values
// and the gradient of out are bfloat16 already. Probs and gradients of scores are rounded to bfloat16 for the sums.
#pragma once
#include "kernels/backward_strips.h"
#include "kernels/engine_pairs.h"

namespace selfattn::SELFATTN_ISA {

struct BackwardPairs : PairUnit {
  using Element = BFloat;

  static const float* join(const float* rows, std::int64_t stride, int count, std::int64_t width, float* to) {
    const std::int64_t joined_stride = padded<float>(width);
    for (int row = 0; row < count; row += cell, rows += cell * stride, to += joined_stride) {
      const BFloat* first = reinterpret_cast<const BFloat*>(rows);
      for (std::int64_t d = 0; d < width; d += VecF::width) {
        const VecF second = row + 1 < count ? load(first + cell * stride + d) : broadcast(0.0f);
        store(to + d, to_cells(load(first + d), second));
      }
    }
    return to - ceil_div(count, cell) * joined_stride;
  }

  static void keep_lines(const VecF (&numbers)[cell], float* line, std::int64_t stride) {
    store_halves(line, line + stride, to_cells_in_order(numbers[0], numbers[1]));
  }
  static void keep_joined(const VecF (&numbers)[cell], float* line) { store(line, to_cells(numbers[0], numbers[1])); }

  static VecF without(VecF cells, int half, MaskF lanes) {
    const VecF zero = broadcast(0.0f);
    return select(lanes, half == 0 ? to_cells(zero, second_of(cells)) : to_cells(first_of(cells), zero), cells);
  }
};

}  // namespace selfattn::SELFATTN_ISA
