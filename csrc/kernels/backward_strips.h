// The strips of a block of rows in the backward pass: rows that share registers.
#pragma once
#include "kernels/kernel_set.h"
#include "simd/vec.h"

namespace selfattn::SELFATTN_ISA {

// Vectors that hold `count` elements, in elements: the step between rows of operands.
template <class T>
constexpr std::int64_t padded(std::int64_t count) {
  return (count + Vec<T>::width - 1) / Vec<T>::width * Vec<T>::width;
}

// The number of vectors of a strip.
template <int N>
struct Columns {
  static constexpr int value = N;
};

template <int N, class Use>
inline void with_columns(int vectors, Use use) {
  if constexpr (N > 1)
    if (vectors < N) return with_columns<N - 1>(vectors, use);
  use(Columns<N>());
}

// Calls use(first row, rows, Columns<vectors>()) for each strip of a block. A strip has at most `Vectors` vectors.
template <class T, int Vectors, class Use>
inline void each_strip_of(int block_rows, Use use) {
  constexpr int W = Vec<T>::width, most = Vectors * W;
  for (int first = 0; first < block_rows; first += most) {
    const int rows = block_rows - first < most ? block_rows - first : most;
    with_columns<Vectors>((rows + W - 1) / W, [&](auto columns) { use(first, rows, columns); });
  }
}

// Rows that share registers, and the keys of the current key block that at least one of them may see.
struct Strip {
  int first_row;
  int rows;
  std::int64_t begin_min, begin_max;  // of key_begin over the rows
  std::int64_t end_min, end_max;      // of key_end over the rows
  bool shares_terms;
};

inline Strip make_strip(const BackwardBlock& block, int first, int count) {
  const Row* rows = block.rows + first;
  Strip strip{first,           count,           rows[0].key_begin,        rows[0].key_begin,
              rows[0].key_end, rows[0].key_end, !block.terms.bias_at_hand};
  for (int i = 1; i < strip.rows; ++i) {
    const std::int64_t begin = rows[i].key_begin, end = rows[i].key_end;
    strip.begin_min = begin < strip.begin_min ? begin : strip.begin_min;
    strip.begin_max = begin > strip.begin_max ? begin : strip.begin_max;
    strip.end_min = end < strip.end_min ? end : strip.end_min;
    strip.end_max = end > strip.end_max ? end : strip.end_max;
    strip.shares_terms = strip.shares_terms && rows[i].mask == rows[0].mask && rows[i].bias == rows[0].bias;
  }
  return strip;
}

}  // namespace selfattn::SELFATTN_ISA
