// The units that multiply in the backward pass, and the form of the operands that each unit reads.
//
// A unit multiplies one cell at a time: one number, or a pair of bfloat16. Products over head_dim read the operands'
// rows in memory as cells. Sums over keys need cells of adjacent keys, and sums over rows need cells of adjacent rows.
// So a unit defines:
//   join           [row][dim] -> [cell of rows][dim]
//   keep_lines     stores the numbers of `cell` keys as cells of adjacent rows: [key][cell of rows]
//   keep_joined    stores the same numbers as cells of adjacent keys: [cell of keys][row]
//   without        sets one half of each cell to 0 in some lanes
#pragma once
#include "kernels/tile_matmul.h"

namespace selfattn::SELFATTN_ISA {

// A cell is one number, so all forms are the same.
template <class T>
struct BackwardFma : FmaUnit<T> {
  using FmaUnit<T>::cell;

  static const T* join(const T* rows, std::int64_t, int, std::int64_t, T*) { return rows; }
  static void keep_lines(const Vec<T> (&numbers)[cell], T* line, std::int64_t) { store(line, numbers[0]); }
  static void keep_joined(const Vec<T> (&)[cell], T*) {}
  static Vec<T> without(Vec<T> cells, int, Mask<T> lanes) { return select(lanes, broadcast(T(0)), cells); }
};

}  // namespace selfattn::SELFATTN_ISA
