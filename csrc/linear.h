// Linear layers: rows of x times packed weights. A norm may precede the product; activation, gate and residual may
// follow it.
#pragma once
#include <cstdint>

#include "norm.h"
#include "projection.h"
#include "task_loop.h"

namespace selfattn {

// out = activation(norm(x) . w + b) + residual, or activation(norm(x) . w_gate + b_gate) * (norm(x) . w + b) +
// residual. The elements of a row of out are contiguous. The residual may be out itself, if both have the same strides.
struct LinearJob {
  const Projection& projection;
  RowsView x;
  char* out;
  DType out_dtype;
  std::int64_t out_stride;  // bytes from row to row
  const Norm* norm = nullptr;
  const Projection* gate = nullptr;  // has as many columns as `projection`
  Activation activation = Activation::none;
  const RowsView* residual = nullptr;  // of the type of out
  std::int64_t first_row = 0;          // of the residual
};

double flops(const LinearJob& job);
double weight_bytes(const LinearJob& job);
// Identifies the kind of work (task_loop.h).
const void* kernel_of(const LinearJob& job);
// The largest number of panels that a task takes.
std::int64_t most_panels(const LinearJob& job);

// Some rows of x and some panels: rows [first, first + rows) at the index `outer` of the outer axes of x. `out` points
// to column 0 of the result of the first of these rows.
struct LinearBlock {
  std::int64_t outer, first, rows;
  Projection::Panels panels;
  char* out;
};

// One thread's scratch memory for the blocks of some jobs.
class LinearSpace {
 public:
  // For blocks of at most `rows` rows.
  LinearSpace(char* base, const LinearJob* jobs, int count, std::int64_t rows);
  std::size_t bytes() const { return bytes_; }
  void forget();  // call it before the first block, and after rows of x have changed
  // The block has at most most_rows rows, or is a task of run_all.
  void run(const LinearJob& job, const LinearBlock& block) noexcept;

  static constexpr std::int64_t most_rows = 96;

 private:
  void follow(const LinearJob& job, const LinearBlock& block, const char* x, std::int64_t x_stride) noexcept;
  bool holds(const char* from, std::int64_t rows, const LinearJob& job) const;

  // Identifies the rows of x in the buffer `x_`. The next block often needs these rows again, for other panels or for
  // another projection of x.
  struct Held {
    const char* from;
    std::int64_t rows;
    const LinearJob* job;
  };
  Held* held_;
  char* x_;
  char* row_;  // for a norm
  char* sums_;
  char* gates_;
  char* residual_;
  std::size_t bytes_;
};

// Runs all jobs as one list of tasks. Returns false if interrupted.
bool run_all(const LinearJob* jobs, int count, int num_threads, Interrupted interrupted);

}  // namespace selfattn
