// How to compute a problem: kernels, block sizes, tasks, threads and memory. Arithmetic alone: no memory is touched.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/kernel_set.h"
#include "problem.h"

namespace selfattn {

struct Plan {
  const KernelSet* kernels;
  const TypeKernels* types;
  const AttendKernel* attend;
  const char* reason;       // why this kernel
  std::int64_t rows;        // query rows of one KV head: q_len * group_size
  int block_rows;           // query rows of one task
  std::int64_t row_blocks;  // of one KV head
  int key_block;            // keys that a kernel takes at a time
  std::int64_t range_keys;  // keys of one task, where an entry has all keys
  std::int64_t ranges;      // tasks along the keys, at most; where an entry has more than one, their results are merged
  std::int64_t tasks;
  bool copies_queries, copies_keys, copies_values, copies_out;  // operands that kernels cannot read or write in place
  bool copies_relative;
  std::int64_t relative_keys;  // that relative products are made for at a time
  DType out_type;  // that kernels write: the type of computation, or that of out where they can write it in place
  int threads;
  std::size_t thread_bytes;  // scratch of one thread
  std::size_t shared_bytes;  // partial results and their counters
  double flops, bytes;       // operations, and bytes of keys and values
};

// The key ranges of a batch entry that has `keys` keys: what others have, or an array has room for, changes no bits.
struct Ranges {
  std::int64_t keys, count;
};
Ranges ranges_of(const Plan& plan, std::int64_t keys);

// num_threads 0: the default. The plan depends on it only in `threads`: the bits of a result never do.
Plan make_plan(const Problem& problem, const KernelSet& kernels, int num_threads);

}  // namespace selfattn
