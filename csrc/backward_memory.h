// The layout of the scratch memory of a backward pass.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "backward.h"

namespace selfattn {

// Memory for the gradients of relative products.
struct RelativeMemory {
  char* dproducts = nullptr;  // block_rows elements of margin, then [block_rows][score_stride]
  char* queries = nullptr;    // [block_rows][head_dim]: queries plus relative_bias
  char* dquery = nullptr;     // [block_rows][head_dim]
  char* vectors = nullptr;    // [block_rows + range_keys - 1][head_dim]: the vectors of the block's distances
  char* dvectors = nullptr;   // as `vectors`: sums of the vectors' gradients, see backward_relative.h
  // Sums of gradients for the current head, [head_dim] each: of the first and the last vector of the table, and of the
  // vectors that are added to queries.
  double* ends[2] = {};
  double* key_bias = nullptr;
  double* relative_bias = nullptr;
};

// Rows of operands in the form that kernels need: the caller's rows if they have this form, otherwise copies in the
// thread's memory.
struct BackwardOperands {
  const char *queries, *dout;  // of the current block of rows
  const char *keys, *values;   // of the current task
};

// One thread's memory. Rows are padded to whole SIMD vectors.
struct BackwardThreadMemory {
  Row* rows;
  char* queries;  // [block_rows][head_dim]
  char* dout;     // [block_rows][value_dim]
  char* out;      // [block_rows][value_dim]
  char* dquery;   // [block_rows][head_dim]
  char* keys;     // [range_keys][head_dim]
  char* values;   // [range_keys][value_dim]
  char* dkeys;
  char* dvalues;
  char* dscores;  // [block_rows][score_stride]
  char* columns;  // [block_rows + score_stride]: one number per column of a block, see backward_sums.cpp
  char* kernel_scratch;
  BackwardOperands operands{};
  DistanceMemory distance;
  double* distance_sums;  // of the current head: Gradients::distance_bias
  RelativeMemory relative;
  std::size_t bytes;

  BackwardThreadMemory(char* base, const BackwardPlan& plan, const Problem& problem, const Gradients& gradients);
};

// Memory that all threads share.
struct BackwardShared {
  // Per row of each head, [batch][head][row_blocks * block_rows]: see BackwardBlock.
  char* shift;
  char* factor;
  char* delta;
  char* dquery;                              // [batch][head][q_len][head_dim], if the plan buffers it
  std::atomic<std::int32_t>* rows_prepared;  // per row task: 1 if it is done
  std::atomic<std::int64_t>* progress;       // per range task: number of blocks of rows finished or skipped
  std::size_t bytes;

  BackwardShared(char* base, const BackwardPlan& plan, const Problem& problem);
};

}  // namespace selfattn
