// The layout of the scratch memory of a backward pass.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "backward.h"

namespace selfattn {

// Rows of operands in the form that kernels need: the caller's own, if they have it, or copies in a slot.
struct BackwardRows {
  const char *queries, *dout;  // of the current block of rows
  const char *keys, *values;   // of the current task
};

// One thread's memory. Rows are padded to whole vectors.
struct BackwardSlot {
  Row* rows;
  char* queries;  // [block_rows][head_dim]
  char* dout;     // [block_rows][value_dim]
  char* out;      // the same
  char* dquery;   // [block_rows][head_dim]
  char* keys;     // [range_keys][head_dim]
  char* values;   // [range_keys][value_dim]
  char* dkeys;
  char* dvalues;
  char* dscores;  // [block_rows][range_keys]
  char* kernel_scratch;
  BackwardRows operands{};
  DistanceMemory distance;
  double* distance_sums;  // of the current head: Gradients::distance_bias
  std::size_t bytes;

  BackwardSlot(char* base, const BackwardPlan& plan, const Problem& problem, const Gradients& gradients);
};

// Memory of all threads.
struct BackwardShared {
  // Per row of each head, [batch][head][row_blocks * block_rows]: see BackwardBlock.
  char* shift;
  char* factor;
  char* delta;
  char* dquery;                              // [batch][head][q_len][head_dim], if the plan buffers it
  std::atomic<std::int32_t>* rows_prepared;  // per row task: whether it is done
  std::atomic<std::int64_t>* progress;       // per range task: blocks of rows that it has finished or skipped
  std::size_t bytes;

  BackwardShared(char* base, const BackwardPlan& plan, const Problem& problem);
};

}  // namespace selfattn
