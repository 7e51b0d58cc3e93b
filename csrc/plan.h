// How to compute a problem: kernels, block sizes, tasks and memory. Planning is arithmetic on the problem's
// description: it neither accesses the operands' elements nor queries the machine. threads_for (attend.h) chooses the
// threads.
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
  const char* reason;       // why this kernel was chosen
  std::int64_t rows;        // query rows of one KV head: q_len * group_size
  int block_rows;           // query rows of one row block
  std::int64_t row_blocks;  // of one KV head
  std::int64_t row_tasks;   // of one KV head; row task t computes the row blocks t, t + row_tasks, ...
  int key_block;            // keys per block; the last block may have fewer
  bool splits_keys;         // whether a task may process only a range of the keys
  std::int64_t range_keys;  // keys of one task, for an entry with kv_len keys
  std::int64_t ranges;      // largest number of key ranges of an entry; the results of several ranges are merged
  std::int64_t tasks;
  bool copies_queries, copies_keys, copies_values, copies_out;  // operands that kernels cannot read or write in place
  bool copies_relative;
  bool keeps_scores;           // of whole rows, in scratch, to compute the key mass from them
  std::int64_t relative_keys;  // keys for which relative products are computed at a time
  DType out_type;            // what kernels write: the type of computation, or out's type if they write to out directly
  std::size_t thread_bytes;  // scratch of one thread
  std::size_t shared_bytes;  // partial results and their counters
  double flops, bytes;       // operations, and bytes of keys and values
};

// The key ranges of a batch entry with `keys` keys. The lengths of other entries and the capacity of the array do not
// affect these ranges, so they do not affect the entry's results.
struct Ranges {
  std::int64_t keys, count;
};
Ranges ranges_of(const Plan& plan, std::int64_t keys);

Plan make_plan(const Problem& problem, const KernelSet& kernels);

}  // namespace selfattn
