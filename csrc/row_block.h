// The query rows of one task: set up before the loop over the keys, and finished after it.
#pragma once
#include "plan.h"
#include "problem.h"
#include "score_rows.h"
#include "thread_memory.h"

namespace selfattn {

// The rows of a block, for all query heads of a KV head.
RowSpan span_of(const Problem& problem, const Plan& plan, std::int64_t batch, std::int64_t kv_head,
                std::int64_t row_block);

// Fills memory.rows for the valid rows. Copies queries that kernels cannot read in place.
void describe_rows(const Problem& problem, const Plan& plan, const RowSpan& span, const ThreadMemory& memory,
                   bool with_sinks);

// For masks that cover only the newest keys: expands them to the keys [first, first + count) and points memory.rows to
// the result. Keys that a mask does not cover are visible.
void spread_masks(const Problem& problem, const RowSpan& span, const ThreadMemory& memory, std::int64_t first,
                  int count);

// Computes lse and weights from row_max and row_sum, adds the weights to memory.mass for the key mass, and copies
// outputs that were computed in scratch to `out`.
void complete_rows(const Problem& problem, const Plan& plan, const RowSpan& span, const ThreadMemory& memory,
                   const char* row_max, const char* row_sum);

// A row's log-sum-exp, from its maximum and sum in units of log2.
double lse_of(double row_max, double row_sum, double omitted);

// For problems with running sums: copy the valid rows' maxima and sums to memory.row_max and memory.row_sum, and back.
void load_sums(const Problem& problem, const RowSpan& span, const ThreadMemory& memory);
void store_sums(const Problem& problem, const RowSpan& span, const ThreadMemory& memory);

// Writes the empty results of rows beyond q_lens.
void clear_rows(const Problem& problem, const RowSpan& span);

// Merges the partial results of a row block in the order of its key ranges.
void merge_ranges(const Problem& problem, const Plan& plan, const Shared& shared, std::int64_t block,
                  const RowSpan& span, const ThreadMemory& memory);

}  // namespace selfattn
