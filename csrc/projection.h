// Linear projections with packed weights: x . w + b, several at once.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernel_set.h"
#include "problem.h"
#include "scratch_pool.h"
#include "task_loop.h"

namespace selfattn {

// A weight matrix (depth, columns) with its bias, packed for one kernel set into panels of columns:
// [panel][depth][column]. Weights keep their type; the bias is converted to the type of computation.
class Projection {
 public:
  // `weights` is 2-D, `bias` 1-D or absent and of the same type; any strides.
  Projection(const KernelSet& kernels, const TensorView& weights, const TensorView& bias);
  std::int64_t depth() const { return depth_; }
  std::int64_t columns() const { return columns_; }
  std::int64_t panels() const { return (columns_ + types_->panel_columns - 1) / types_->panel_columns; }
  std::int64_t panel_columns() const { return types_->panel_columns; }
  DType computation() const { return computed_in(dtype_); }
  // The type that rows of x must have: bfloat16 if a unit multiplies bfloat16 weights in pairs along the depth, else
  // the type of computation.
  DType operand() const { return pairs_ ? dtype_ : computation(); }
  bool pairs() const { return pairs_; }
  const KernelSet& kernels() const { return *kernels_; }

  // Writes the original weights to a matrix of the same type.
  void unpack(const TensorView& weights) const;
  // The bias in the type of computation, or null.
  const char* bias() const { return bias_.get(); }

  // Computes the columns of one panel for `rows` rows of x. Rows of x are contiguous elements of type operand() (for
  // pairs, see MatrixKernels); rows of out are contiguous elements of the type of computation. Steps are in elements.
  void project(std::int64_t panel, const void* x, std::int64_t x_step, std::int64_t rows, void* out,
               std::int64_t out_step) const noexcept;

 private:
  std::int64_t panel_rows() const;  // padded depth
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

// x (..., S, d_model) as rows. Leading axes that continue the stride of the rows are folded into them.
struct RowsView {
  const char* data;
  DType dtype;
  std::int64_t rows, row, column;  // bytes
  std::int64_t outer = 1;          // entries of the other axes together
  std::vector<BatchAxis> axes;     // nearly always none; innermost first

  explicit RowsView(const TensorView& x);
  const char* at(std::int64_t outer_index) const;
};

// One projection of a call, from x (any strides) to a matrix of contiguous rows.
struct ProjectionJob {
  const Projection& projection;
  RowsView x;
  char* out;
  DType out_dtype;
  std::int64_t out_step;  // bytes from row to row
};

// Runs all jobs as one list of tasks. Returns false if interrupted.
bool project_all(const ProjectionJob* jobs, int count, int num_threads, Interrupted interrupted);

}  // namespace selfattn
