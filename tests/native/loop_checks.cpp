#include "guarded_memory.h"
#include "isa_checks.h"
#include "kernels/pack.h"
#include "kernels/tile_matmul.h"
#include "kernels/values.h"
#include "lanes.h"

namespace selfattn::SELFATTN_ISA {
namespace {

constexpr int most_rows = 19, most_depth = 9, most_columns = 3 * 16;

template <class T>
void fill(T* p, std::int64_t count) {
  Numbers numbers;
  for (std::int64_t i = 0; i < count; ++i) p[i] = numbers.next<T>();
}

// Counts the calls of fetch. A sum must continue where it was before the call.
struct CountsFetches {
  static constexpr std::int64_t interval = 4;
  int* calls;
  void fetch() { ++*calls; }
};

// Each sum must be bit-identical to one chain of FMAs in the order of k. The operands end at inaccessible memory.
template <class T, int Rows, int Cols, bool transposed>
void check_multiply(int rows, int depth) {
  constexpr int columns = Cols * Vec<T>::width;
  static_assert(columns <= most_columns);
  T* const b = reinterpret_cast<T*>(test::guarded_area().end) - depth * columns;
  T* const a = b - rows * depth;
  fill(a, rows * depth + depth * columns);
  T out[most_rows][columns];
  int finished[most_rows] = {}, tiles = 0, calls = 0;
  const auto finish = [&](std::int64_t row, const auto& sums) {
    ++tiles;
    for (const auto& line : sums) {
      for (int c = 0; c < Cols; ++c) store(out[row] + c * Vec<T>::width, line[c]);
      ++finished[row++];
    }
  };
  const RightOperand<T> right{b, columns, depth};
  if constexpr (transposed)
    multiply_rows<Rows, Cols, FmaUnit<T>>(Transposed<T>{a, rows}, rows, right, finish, CountsFetches{&calls});
  else
    multiply_rows<Rows, Cols, FmaUnit<T>>(RowMajor<T>{a, depth}, rows, right, finish, CountsFetches{&calls});
  SELFATTN_CHECK(calls == tiles * ceil_div(depth, CountsFetches::interval));
  for (int r = 0; r < rows; ++r) {
    SELFATTN_CHECK(finished[r] == 1);
    for (int n = 0; n < columns; ++n) {
      T sum = 0;
      for (int k = 0; k < depth; ++k)
        sum = scalar_fma(transposed ? a[k * rows + r] : a[r * depth + k], b[k * columns + n], sum);
      test::expect_same(out[r][n], sum, "multiply_rows");
    }
  }
}

template <class T, int Rows, int Cols>
void check_multiply_shapes() {
  for (int rows = 0; rows <= most_rows; ++rows)
    for (int depth = 0; depth <= most_depth; depth += 3) {
      check_multiply<T, Rows, Cols, false>(rows, depth);
      check_multiply<T, Rows, Cols, true>(rows, depth);
    }
}

// Packs rows that end at inaccessible memory, and unpacks them again.
template <class T>
void check_packing(int rows, int count) {
  constexpr int W = Vec<T>::width;
  const int lanes = (rows + W - 1) / W * W;
  T* const matrix = reinterpret_cast<T*>(test::guarded_area().end) - rows * count;
  fill(matrix, rows * count);
  T columns[most_columns * most_columns];
  rows_to_columns(columns, lanes, lanes, count, [&](int row, std::int64_t j, int n) {
    return row < rows ? load_up_to(matrix + row * count + j, n) : broadcast(T(0));
  });
  for (int j = 0; j < count; ++j)
    for (int i = 0; i < lanes; ++i)
      test::expect_same(columns[j * lanes + i], i < rows ? matrix[i * count + j] : T(0), "rows_to_columns");
  for (int i = 0; i < rows * count; ++i) matrix[i] = T(-7);
  columns_to_rows<T>(
      rows, count, [&](int row) { return matrix + row * count; },
      [&](std::int64_t j, int i) { return load(columns + j * lanes + i); });
  for (int j = 0; j < count; ++j)
    for (int i = 0; i < rows; ++i) test::expect_same(matrix[i * count + j], columns[j * lanes + i], "columns_to_rows");
}

template <class T>
void check_finite_scan() {
  for (int dim = 1; dim <= 21; dim += 5) {
    constexpr int rows = 3;
    constexpr T odd_ones[] = {infinity<T>, -infinity<T>, not_a_number<T>};
    T* const values = reinterpret_cast<T*>(test::guarded_area().end) - rows * dim;
    fill(values, rows * dim);
    values[0] = Limits<T>::largest;  // large finite numbers must not overflow in the scan
    const auto row_at = [&](int r) { return values + std::int64_t{r} * dim; };
    SELFATTN_CHECK(all_finite(row_at, rows, dim));
    for (int i = 0; i < rows * dim; ++i)
      for (const T odd : odd_ones) {
        const T kept = values[i];
        values[i] = odd;
        SELFATTN_CHECK(!all_finite(row_at, rows, dim));
        values[i] = kept;
      }
  }
}

template <class T>
void check_all() {
  test::begin_section(Limits<T>::name);
  check_multiply_shapes<T, 8, 3>();
  check_multiply_shapes<T, 4, 2>();
  check_multiply_shapes<T, 4, 1>();
  for (int rows = 1; rows <= most_rows; ++rows)
    for (int count = 1; count <= 33; count += 4) check_packing<T>(rows, count);
  check_finite_scan<T>();
}

}  // namespace

void check_loops() {
  check_all<float>();
  check_all<double>();
}

}  // namespace selfattn::SELFATTN_ISA
