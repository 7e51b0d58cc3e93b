// A strip: rows of a block that share registers.
#pragma once
#include "kernels/kernel_set.h"
#include "simd/vec.h"

namespace selfattn::SELFATTN_ISA {

struct Strip {
  int first_row;
  int rows;
  int vectors;                        // registers that hold these rows
  std::int64_t begin_min, begin_max;  // least and largest key_begin of the rows; may lie outside the key block
  std::int64_t end_min, end_max;      // least and largest key_end of the rows
  bool shares_terms;                  // all rows read the same mask and bias
};

template <class T>
Strip make_strip(const Row* block_rows, const Scoring& scoring, int first_row, int count) {
  constexpr int W = Vec<T>::width;
  const Row* rows = block_rows + first_row;
  const std::int64_t begin = rows[0].key_begin, end = rows[0].key_end;
  Strip strip{first_row, count, ceil_div(count, W), begin, begin, end, end, !scoring.bias_at_hand};
  for (int i = 1; i < count; ++i) {
    const Row& row = rows[i];
    strip.begin_min = row.key_begin < strip.begin_min ? row.key_begin : strip.begin_min;
    strip.begin_max = row.key_begin > strip.begin_max ? row.key_begin : strip.begin_max;
    strip.end_min = row.key_end < strip.end_min ? row.key_end : strip.end_min;
    strip.end_max = row.key_end > strip.end_max ? row.key_end : strip.end_max;
    strip.shares_terms = strip.shares_terms && row.mask == rows[0].mask && row.bias == rows[0].bias;
  }
  return strip;
}

}  // namespace selfattn::SELFATTN_ISA
