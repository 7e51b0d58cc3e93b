// The arguments of the kernels for layers: products with packed weights, the steps after a product, and norms.
#pragma once
#include <cstdint>

namespace selfattn {

// Products with a larger depth are computed in slices of this depth. Each slice is multiplied for all rows and panels
// of a call before the next slice, so that the slices in use stay in L2. AMX multiplies the whole depth at once; codes
// are multiplied group by group.
constexpr std::int64_t depth_slice = 512;
// The largest depth of a slice if rows of x are split into digits, whose sums then cannot overflow.
constexpr std::int64_t code_slice = 2048;
// Digits and codes are multiplied in cells of four along the depth.
constexpr int digit_cell = 4;
constexpr int most_digits = 2;
constexpr int digit_scale_bytes = 8;  // after each row of digits

// out[i][n] = sum_k x[i][k] * weights[k][n] + bias[n] for one panel of columns, or for several adjacent panels.
struct ProjectArgs {
  const void* x;  // rows of depth contiguous elements, `x_stride` elements apart
  std::int64_t x_stride;
  std::int64_t rows;
  std::int64_t depth;
  const void* panel;  // [depth][panel_columns], zero-padded, in the type of the weights
  const void* bias;   // panel_columns elements; null: none
  void* out;          // rows of `columns` contiguous elements, `out_stride` elements apart
  std::int64_t out_stride;
  std::int64_t columns;           // more than panel_columns if further panels follow
  std::int64_t panel_stride = 0;  // bytes from one panel to the next
  // Codes only: one factor for each group of weight rows and each column; `scale_stride` elements from group to group.
  const float* scales = nullptr;
  std::int64_t scale_stride = 0;
  std::int64_t groups = 1;  // of equal depth
  // Digits only: for each slice and column, -128 times the sum of the codes, since the unit multiplies digit + 128.
  const std::int32_t* starts = nullptr;
  int digits = 0;  // of a number in x
};

enum class Activation : std::uint8_t { none, relu, gelu, gelu_tanh, silu };

// out = activation(sums) + residual, or activation(gates) * sums + residual, for rows of contiguous elements.
// Overwrites sums and gates.
struct FinishArgs {
  Activation activation;
  void* sums;
  void* gates;  // null: none
  std::int64_t sums_stride;
  const void* residual;  // in the type of out; null: none
  std::int64_t residual_stride;
  void* out;
  std::int64_t out_stride;
  std::int64_t rows, columns;
};

// Adds the addend to a row, then normalises the row in place: subtracts the mean if `centred`, divides by the square
// root of (mean square + epsilon), multiplies by the weight and adds the bias. All arrays have the type of computation.
struct NormArgs {
  void* row;
  const void* addend;  // null: none
  const void* weight;  // null: none
  const void* bias;    // null: none
  std::int64_t count;
  double epsilon;
  bool centred;
};

}  // namespace selfattn
