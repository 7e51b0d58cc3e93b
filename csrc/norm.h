// Layer norm and RMS norm of rows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/kernel_set.h"
#include "projection.h"
#include "task_loop.h"

namespace selfattn {

// How rows are normalised. Weight and bias are contiguous numbers of the type of computation, or null.
struct Norm {
  const char* weight;
  const char* bias;
  double epsilon;
  bool centred;  // layer norm, else RMS norm
};

// Normalises the sum of a contiguous row and an addend in place. Both have the type of computation; the addend may be
// null.
void normalise(const KernelSet& kernels, const Norm& norm, DType dtype, char* row, const char* addend,
               std::int64_t count);

// out = norm(x + residual), for rows of `count` elements. The elements of a row of out are contiguous.
struct NormJob {
  const KernelSet& kernels;
  const Norm& norm;
  std::int64_t count;
  RowsView x;
  const RowsView* residual;  // null: none
  char* out;
  DType out_dtype;
  std::int64_t out_stride;     // bytes from row to row
  std::int64_t first_row = 0;  // of the residual
};

// Scratch memory of a thread for `normalise_row`.
struct NormMemory {
  char *row, *addend;
  std::size_t bytes;

  NormMemory(char* base, std::int64_t count, DType computation);
};

// Computes one row. `row` is its index, counted over all axes of x.
void normalise_row(const NormJob& job, std::int64_t row, char* scratch);

double flops(const NormJob& job);
// Computes all rows. Returns false if interrupted.
bool normalise_all(const NormJob& job, int num_threads, Interrupted interrupted);

}  // namespace selfattn
