// Linear projections with packed weights: x . w + b, several at once.
#pragma once
#include <cstdint>
#include <memory>

#include "kernels/kernel_set.h"
#include "problem.h"
#include "scratch_pool.h"
#include "task_loop.h"

namespace selfattn {

// A weight matrix (depth, columns) with its bias, packed for one kernel set: panels of columns, [panel][depth][column].
// Weights keep their type, the bias takes that of the computation.
class Projection {
 public:
  // `weights` is 2-D, `bias` 1-D or absent and of the same type; any strides.
  Projection(const KernelSet& kernels, const TensorView& weights, const TensorView& bias);
  std::int64_t depth() const { return depth_; }
  std::int64_t columns() const { return columns_; }
  std::int64_t panels() const { return (columns_ + types_->panel_columns - 1) / types_->panel_columns; }
  std::int64_t panel_columns() const { return types_->panel_columns; }
  DType computation() const { return computed_in(dtype_); }
  // The type that rows of x must have: weights of bfloat16 are multiplied in pairs along the depth where a unit does
  // so.
  DType operand() const { return pairs_ ? dtype_ : computation(); }
  bool pairs() const { return pairs_; }
  const KernelSet& kernels() const { return *kernels_; }

  // Writes the weights, as they were given, to a matrix of the same type.
  void unpack(const TensorView& weights) const;
  // The bias in the type of computation, or null.
  const char* bias() const { return bias_.get(); }

  // Columns of one panel for `rows` rows of x, of contiguous elements of type operand() (see KernelSet for pairs), to
  // rows of contiguous elements of the type of computation.
  void project(std::int64_t panel, const void* x, std::int64_t x_step, std::int64_t rows, void* out,
               std::int64_t out_step) const noexcept;

 private:
  std::int64_t panel_rows() const;  // along the depth
  template <class Copy>
  void each_part(const TensorView& weights, Copy copy) const;

  struct Free {
    void operator()(char* p) const;
  };
  const KernelSet* kernels_;
  const TypeKernels* types_;
  DType dtype_;
  bool pairs_;
  std::int64_t depth_, columns_;
  std::unique_ptr<char, Free> panels_;
  std::unique_ptr<char, Free> bias_;
};

// x (..., S, d_model) as rows: leading axes that continue the rows' stride are folded into them.
struct RowsView {
  const char* data;
  DType dtype;
  std::int64_t rows, row, column;  // bytes
  int outer_axes;
  std::int64_t outer_shape[max_axes], outer_stride[max_axes];
  std::int64_t outer;  // product of outer_shape

  explicit RowsView(const TensorView& x);
  const char* at(std::int64_t outer_index) const;
};

// One projection of a call: x (any strides) to a matrix of contiguous rows.
struct ProjectionJob {
  const Projection& projection;
  RowsView x;
  char* out;
  DType out_dtype;
  std::int64_t out_step;  // bytes from row to row
};

// Runs all jobs as one list of tasks. False: interrupted.
bool project_all(const ProjectionJob* jobs, int count, int num_threads, Interrupted interrupted);

}  // namespace selfattn
