// One task's query rows: where they are, what they see, and what becomes of them when the keys are through.
#pragma once
#include "plan.h"
#include "problem.h"
#include "slot.h"

namespace selfattn {

// The rows of a KV head are ordered by query, then by head within the group, so that neighbours see the same keys.
struct RowSpan {
  std::int64_t batch, kv_head;
  std::int64_t first;  // row
  int count;
  int valid;  // the first `valid` rows are queries within q_lens; the rest get empty results
};

RowSpan span_of(const Problem& problem, const Plan& plan, std::int64_t batch, std::int64_t kv_head,
                std::int64_t row_block);

// Keys that any valid row of the span may see, before mask and bias.
KeyRange span_keys(const Problem& problem, const RowSpan& span);

// Fills slot.rows for the valid rows; queries that kernels cannot read in place are copied.
void describe_rows(const Problem& problem, const Plan& plan, const RowSpan& span, const Slot& slot, bool with_sinks);

// Copies query i of the span to contiguous elements of a type that holds them, and adds what its head adds to all.
void gather_query(const Problem& problem, const Plan& plan, const RowSpan& span, std::int64_t i, DType type,
                  const PerHead& bias, char* to);

// Where a mask is over the newest keys only: lays out what it says of the keys [first, first + count), which is true of
// those before it, and points slot.rows there.
void spread_masks(const Problem& problem, const RowSpan& span, const Slot& slot, std::int64_t first, int count);

// How products become scores, the same for every row.
ScoreTerms score_terms(const Problem& problem);

// From row_max, row_sum and slot.rows' outputs: lse, weights, and the outputs themselves where they were bounced.
void complete_rows(const Problem& problem, const Plan& plan, const RowSpan& span, const Slot& slot, const char* row_max,
                   const char* row_sum);

// Results of the rows beyond q_lens.
void clear_rows(const Problem& problem, const RowSpan& span);

// Merges the ranges of a row block in their order, as if the keys had been absorbed one range after the other.
void merge_ranges(const Problem& problem, const Plan& plan, const Shared& shared, std::int64_t block,
                  const RowSpan& span, const Slot& slot);

}  // namespace selfattn
