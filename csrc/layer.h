// The whole mechanism in one call: projections of x to queries, keys and values, attention, output projection.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "kernels/kernel_set.h"
#include "problem.h"
#include "rope.h"
#include "task_loop.h"

namespace selfattn {

// A weight matrix (depth, columns) with its bias, packed for one kernel set: panels of columns, [panel][depth][column].
class Projection {
 public:
  // `weights` is 2-D, `bias` 1-D or absent; any strides.
  Projection(const TypeKernels& kernels, const TensorView& weights, const TensorView& bias);
  std::int64_t depth() const { return depth_; }
  std::int64_t columns() const { return columns_; }
  std::int64_t panels() const { return (columns_ + kernels_->panel_columns - 1) / kernels_->panel_columns; }
  const TypeKernels& kernels() const { return *kernels_; }
  std::int64_t element_size() const { return size_; }

  // Columns of one panel for `rows` rows of x; x and out have contiguous elements.
  void project(std::int64_t panel, const void* x, std::int64_t x_step, std::int64_t rows, void* out,
               std::int64_t out_step) const noexcept;

 private:
  struct Free {
    void operator()(char* p) const;
  };
  const TypeKernels* kernels_;
  std::int64_t depth_, columns_, size_;
  std::unique_ptr<char, Free> panels_;
  std::unique_ptr<char, Free> bias_;
};

struct LayerWeights {
  const KernelSet* kernels;
  DType dtype;
  std::int64_t num_heads, num_kv_heads, head_dim, value_dim;
  Projection query, key, value;
  std::optional<Projection> output;
  std::optional<Rope> rope;
};

// x (..., S, d_model) as rows: leading axes that continue the rows' stride are folded into them.
struct RowsView {
  const char* data;
  std::int64_t rows, row, column;  // bytes
  int outer_axes;
  std::int64_t outer_shape[max_axes], outer_stride[max_axes];
  std::int64_t outer;  // product of outer_shape

  explicit RowsView(const TensorView& x);
  const char* at(std::int64_t outer_index) const;
};

// One call of a layer. The arguments' q, k and v are set here; everything else is the caller's.
class LayerCall {
 public:
  // `context` may be absent. Throws like make_problem; allocates all memory.
  LayerCall(const LayerWeights& layer, const TensorView& x, const TensorView& context, const TensorView& positions,
            AttentionArguments arguments);
  ~LayerCall();
  Problem& problem();  // to attach lse and weights
  Shape out_shape() const;
  double flops() const;
  // False: interrupted.
  bool run(const TensorView& out, int max_threads, Interrupted interrupted);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace selfattn
