// The strips of a block of rows in the backward pass: rows that share registers.
#pragma once
#include "kernels/strip.h"

namespace selfattn::SELFATTN_ISA {

// `count` rounded up to whole vectors: the step between rows of operands, in elements.
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

}  // namespace selfattn::SELFATTN_ISA
