// The backward pass of relative products. A relative product multiplies a query by the vector of its distance to a key.
// The rows of a block are consecutive queries, so all pairs of row and key on a diagonal have the same distance. To
// turn diagonals into columns, each row is shifted:
//
//   factors[column][row] = dproducts[row][column - (rows - 1 - row)]
//
// All elements of a column then belong to one distance. The gradients of queries and vectors are the two sums of
// backward_sums.h, with the vector of a column's distance in the place of a key.
#pragma once
#include "kernels/backward_strips.h"
#include "kernels/backward_sums.h"
#include "kernels/backward_units.h"
#include "kernels/scratch.h"

namespace selfattn::SELFATTN_ISA {

template <class T, int TileRows, int Vectors, int SumRows, int SumVectors>
struct RelativeBackward {
  using Sums = BackwardSums<BackwardFma<T>, TileRows, SumRows>;
  static constexpr int W = Vec<T>::width;

  struct Memory {
    T* factors;  // [column_block][block_lanes]
    T* dquery;   // per strip [head_dim][lanes]
    std::int64_t block_lanes;
    std::size_t bytes;

    Memory(void* base, int rows, int column_block, std::int64_t head_dim) : block_lanes(padded<T>(rows)) {
      Carver carver{static_cast<char*>(base)};
      factors = carver.take<T>(column_block * block_lanes);
      dquery = carver.take<T>(block_lanes * head_dim);
      bytes = carver.used;
    }
  };

  struct ColumnRange {
    int begin, end;
  };

  static void run(const RelativeBlock& block) noexcept {
    const Memory s(block.scratch, block.count, block.column_block, block.head_dim);
    const std::int64_t stride = padded<T>(block.head_dim);
    each_strip_of<T, Vectors>(block.count, [&](int first, int, auto columns) {
      Sums::template clear<columns.value>(block.head_dim, s.dquery + first * block.head_dim);
    });
    const int columns = block.key_count + block.count - 1;
    for (int done = 0; done < columns; done += block.column_block)
      absorb(block, s, {done, columns - done < block.column_block ? columns : done + block.column_block});
    if (!block.dquery) return;
    each_strip_of<T, Vectors>(block.count, [&](int first, int rows, auto columns) {
      Sums::template store_rows<columns.value>(s.dquery + first * block.head_dim, rows, block.head_dim,
                                               static_cast<T*>(block.dquery) + first * stride, stride);
    });
  }

 private:
  static void absorb(const RelativeBlock& block, const Memory& s, ColumnRange all) {
    const std::int64_t stride = padded<T>(block.head_dim);
    const ColumnRange seen = seen_columns(block, 0, block.count, all);
    if (seen.begin == seen.end) return;
    const Skipped<T> zeros{block.finite ? nullptr : s.factors, T(0), s.block_lanes};
    each_strip_of<T, Vectors>(block.count, [&](int first, int rows, auto columns) {
      align(block, s, first, rows, columns.value * W, seen);
      const ColumnRange own = seen_columns(block, first, rows, all);
      if (own.begin == own.end || !block.dquery) return;
      const std::int64_t offset = (own.begin - seen.begin) * s.block_lanes + first;
      Sums::template add_key_sums<columns.value>(
          {static_cast<const T*>(block.vectors) + own.begin * stride, stride, own.end - own.begin, s.factors + offset,
           s.block_lanes, zeros.from(offset)},
          block.head_dim, s.dquery + first * block.head_dim);
    });
    if (block.dvectors)
      Sums::template add_row_sums<SumVectors>(
          {s.factors, s.block_lanes, static_cast<const T*>(block.queries), stride, zeros}, seen.end - seen.begin,
          block.count, static_cast<T*>(block.dvectors) + seen.begin * stride);
  }

  // The columns of `all` from the first to the last in which one of the rows sees a key. If there is none,
  // begin == end.
  static ColumnRange seen_columns(const RelativeBlock& block, int first, int rows, ColumnRange all) {
    std::int64_t begin = all.end, end = all.begin;
    for (int i = first; i < first + rows; ++i) {
      const std::int64_t shift = block.count - 1 - i - block.first_key;
      const std::int64_t last = block.first_key + block.key_count;
      const std::int64_t from = block.rows[i].key_begin > block.first_key ? block.rows[i].key_begin : block.first_key;
      const std::int64_t to = block.rows[i].key_end < last ? block.rows[i].key_end : last;
      if (from >= to) continue;
      begin = from + shift < begin ? from + shift : begin;
      end = to + shift > end ? to + shift : end;
    }
    begin = begin > all.begin ? begin : all.begin;
    end = end < all.end ? end : all.end;
    return {static_cast<int>(begin), static_cast<int>(end > begin ? end : begin)};
  }

  // Shifts and transposes the rows of a strip.
  static void align(const RelativeBlock& block, const Memory& s, int first, int rows, int lanes, ColumnRange columns) {
    const T* dproducts = static_cast<const T*>(block.dproducts) - (block.count - 1) + columns.begin;
    rows_to_columns(
        s.factors + first, s.block_lanes, lanes, columns.end - columns.begin, [&](int row, std::int64_t column, int n) {
          const std::int64_t i = first + row;
          return row < rows ? load_up_to(dproducts + i * (block.dproduct_stride + 1) + column, n) : broadcast(T(0));
        });
  }
};

}  // namespace selfattn::SELFATTN_ISA
