// The backward pass: gradients of a problem's operands (decision 10).
#pragma once
#include <cstddef>
#include <cstdint>

#include "distance_terms.h"
#include "kernels/kernel_set.h"
#include "problem.h"
#include "task_loop.h"

namespace selfattn {

// What the backward pass reads in addition to the problem, and what it writes. The problem's out and lse hold the
// results of the forward pass. A gradient that is absent or null is not computed. Gradients are in the problem's form,
// with all batch axes.
struct Gradients {
  Operand dout;      // in out's form
  Operand dlse;      // in lse's form; optional
  Operand dweights;  // (batch, num_heads, q_len, kv_len) in the type of computation, keys adjacent; optional
  Operand query, key, value;
  // Gradients of operands that change scores. Each comment gives the shape of the gradient's array. If the operand is
  // broadcast along some of these axes, the caller sums the array over them afterwards. The caller sets the arrays to 0
  // before the backward pass. They have the type of computation, except those declared as double.
  Operand scores;                   // (batch, num_heads, q_len, kv_len); stride 0: summed over this axis
  bool shares_scores = false;       // several heads or batch entries share elements of `scores`
  char* key_sums = nullptr;         // (batch, num_heads, kv_len): sums over queries
  double* row_sums = nullptr;       // (batch, num_heads, q_len): sums over keys
  double* scale = nullptr;          // (batch, num_heads, q_len): each row's share of the gradient of the scale
  double* slopes = nullptr;         // as `scale`, for the ALiBi slope of the row's head
  double* sinks = nullptr;          // as `scale`, for the sink of the row's head
  double* distance_bias = nullptr;  // (batch, num_heads, Problem::distance_bias.count)
  // Gradients of Transformer-XL's terms.
  char* relative = nullptr;         // (batch, num_heads, Problem::relative.count, head_dim)
  double* key_bias = nullptr;       // (batch, num_heads, head_dim)
  double* relative_bias = nullptr;  // (batch, num_heads, head_dim)

  // Whether some result is a sum of gradients of scores. Kernels then write these gradients to scratch memory.
  bool sums_scores() const { return key_sums || row_sums || slopes || distance_bias || (scores && shares_scores); }
  // Whether kernels write the gradients of scores directly to `scores`.
  bool keeps_scores() const { return scores && !sums_scores(); }
  // Whether some result is a sum over all query rows and all key ranges of a head.
  bool of_heads() const { return distance_bias || relative || key_bias || relative_bias; }
  // Whether any result depends on the gradients of queries through q.k, which are sums over keys.
  bool through_keys() const { return query || scale || key_bias; }
  // Whether any result needs a pass over pairs of queries and keys. The gradients of sinks need only the rows.
  bool through_pairs() const { return through_keys() || key || value || scores || sums_scores() || of_heads(); }
  // Whether any result depends on the gradients of relative products.
  bool through_distances(const Problem& problem) const {
    return problem.relative && (query || scale || relative || relative_bias);
  }
};

// The form of rows in memory: `width` contiguous numbers, zero-padded to `stride` numbers.
struct PaddedRows {
  std::int64_t width;
  std::int64_t stride;  // elements from one row to the next
  DType dtype;
};

// How to compute gradients. There are two kinds of tasks. A row task prepares one block of query rows. A range task
// computes the gradients of a range of keys of one KV head. It visits all query rows that see any of these keys, and
// adds to the gradients of a row only after the task of the preceding range has done so.
struct BackwardPlan {
  const KernelSet* kernels;
  const BackwardKernel* kernel;
  int block_rows;           // query rows of one head that are processed at a time
  std::int64_t row_blocks;  // of one head
  int key_block;            // keys that the kernel processes at a time
  int range_keys;           // keys of a range
  std::int64_t ranges;      // of one KV head
  RelativeProducts relative;
  PaddedRows keys, values;                // the form of operands with head_dim and with value_dim columns
  std::int64_t key_stride, value_stride;  // elements from one row of sums to the next, for keys and for values
  std::int64_t score_stride;              // elements from one row to the next, for gradients of scores and of products
  bool buffers_dquery;                    // gradients of queries are summed in scratch memory, then converted
  std::int64_t row_tasks;                 // they come before all range tasks
  std::int64_t tasks;                     // row tasks and range tasks
  std::size_t thread_bytes;
  std::size_t shared_bytes;
  double flops;
};

BackwardPlan make_backward_plan(const Problem& problem, const Gradients& gradients, const KernelSet& kernels);

// Number of threads worth using for a plan, at most num_threads (0: the default). The number does not affect results.
int threads_for(const BackwardPlan& plan, int num_threads);

// Allocates all memory before anything is written; throws std::bad_alloc. Returns false if interrupted; the results are
// then unspecified.
bool attend_backward(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan, int threads,
                     Interrupted interrupted);

struct BackwardJob {
  const Problem* problem;
  const Gradients* gradients;
  const BackwardPlan* plan;
};

// Backward passes of several problems at once: one team of threads computes the tasks of all problems. The problems
// must have the same type of computation, and their gradients must not share memory.
bool attend_backward(const BackwardJob* jobs, std::int64_t count, int threads, Interrupted interrupted);

Work work_of(const BackwardJob* jobs, std::int64_t count);
// Number of threads worth using for all jobs together.
int threads_for(const BackwardJob* jobs, std::int64_t count, int num_threads);

}  // namespace selfattn
