// Linear projections with packed weights: x . w + b.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "arithmetic.h"
#include "attention_options.h"
#include "kernels/kernel_set.h"
#include "problem.h"

namespace selfattn {

// A weight matrix (depth, columns) with its bias, packed for one kernel set into panels of columns:
// [panel][depth][column]. Weights keep their type; the bias is converted to the type of computation.
class Projection {
 public:
  // `weights` is 2-D, `bias` 1-D or absent; any strides. Codes have float32 `scales` (groups, columns): a weight is
  // code * scale. A group consists of adjacent rows of the weights, and all groups have equally many rows.
  // `digits`: see digits_for; 0 for numbers.
  Projection(const KernelSet& kernels, const TensorView& weights, const TensorView& bias, const TensorView& scales = {},
             int digits = 0);
  // The number of 8-bit digits into which numbers of x are split, to be multiplied by codes as integers. 0: codes are
  // widened to float instead, because full precision is wanted or the kernels cannot multiply such groups of codes.
  static int digits_for(const KernelSet& kernels, Precision precision, std::int64_t group_depth);
  std::int64_t depth() const { return depth_; }
  std::int64_t columns() const { return columns_; }
  std::int64_t panels() const { return ceil_div(columns_, types_->panel_columns); }
  std::int64_t panel_columns() const { return types_->panel_columns; }
  DType dtype() const { return dtype_; }
  DType computation() const { return computed_in(dtype_); }
  // The type to which rows of type `x` must be converted: bfloat16 if both x and the weights are bfloat16 and a matrix
  // unit multiplies them in pairs along the depth, otherwise the type of computation.
  DType operand(DType x) const { return pairs_ && x == dtype_ ? dtype_ : computation(); }
  // Whether pairs of numbers share a cell of a panel. Rows of x must then have an even number of elements.
  bool pairs() const { return pairs_; }
  int digits() const { return digits_; }
  const KernelSet& kernels() const { return *kernels_; }
  const StoredKernels& kernels_of(DType dtype) const { return types_->of(dtype); }
  std::int64_t bytes() const { return panels() * panel_bytes(); }

  // Writes the original weights to a matrix of the same type.
  void unpack(const TensorView& weights) const;
  std::int64_t groups() const { return groups_; }
  // The scales of a group, one per column.
  const float* scales(std::int64_t group) const {
    return reinterpret_cast<const float*>(scales_.get()) + group * padded_columns();
  }
  // The bias in the type of computation, or null.
  const char* bias() const { return bias_.get(); }

  // Adjacent panels.
  struct Panels {
    std::int64_t first, count;
  };
  std::int64_t columns_of(Panels panels) const;

  // Rows of x are contiguous elements of type operand (for pairs and digits, see MatrixKernels); rows of out are
  // contiguous elements of the type of computation. Steps are in elements.
  struct Rows {
    DType operand;
    const void* x;
    std::int64_t x_stride, count;
    void* out;
    std::int64_t out_stride;
  };
  // Computes the columns of these panels for some rows.
  void project(Panels panels, const Rows& rows) const noexcept;

 private:
  std::int64_t panel_rows() const;  // padded depth
  std::int64_t padded_columns() const { return panels() * panel_columns(); }
  std::int64_t panel_bytes() const { return panel_rows() * panel_columns() * size_of(dtype_); }
  template <class Copy>
  void each_rows(const TensorView& weights, Copy copy) const;
  void sum_codes(const TensorView& weights);

  struct Free {
    void operator()(char* p) const;
  };
  const KernelSet* kernels_;
  const TypeKernels* types_;
  DType dtype_;
  bool pairs_;
  int digits_;
  std::int64_t depth_, columns_, groups_ = 0;
  std::unique_ptr<char, Free> panels_;
  std::unique_ptr<char, Free> scales_;  // (groups, padded columns), or null
  std::unique_ptr<char, Free> bias_;
  std::vector<std::int32_t> starts_;  // ProjectArgs::starts
};

// x (..., S, d_model) as rows. Leading axes are merged with S where one stride steps through all of them.
struct RowsView {
  const char* data;
  DType dtype;
  std::int64_t rows, row, column;  // number of rows; strides in bytes
  std::int64_t outer = 1;          // product of the extents of the other axes
  std::vector<BatchAxis> axes;     // nearly always none; innermost first

  explicit RowsView(const TensorView& x);
  // Contiguous rows.
  RowsView(const char* data, DType dtype, std::int64_t rows, std::int64_t columns);
  const char* at(std::int64_t outer_index) const;
  // The row with this index, counted over all outer axes.
  const char* at_row(std::int64_t index) const { return at(index / rows) + index % rows * row; }
  std::int64_t total() const { return outer * rows; }
};

}  // namespace selfattn
