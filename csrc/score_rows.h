// The query rows of a task, which keys each may see, and what is added to its scores. Used by the forward and the
// backward pass.
#pragma once
#include "kernels/kernel_set.h"
#include "problem.h"
#include "rows.h"

namespace selfattn {

// Rows of one or several heads of a KV head, ordered by query, then by head. So the rows of one query are adjacent.
// Before mask and bias, they see the same keys.
struct RowSpan {
  std::int64_t batch;
  std::int64_t first_head, heads;
  std::int64_t first;  // index of the first row; its query is first / heads
  int count;
  int valid;  // the first `valid` rows are queries within q_lens; the others get empty results

  std::int64_t kv_head(const Problem& problem) const { return first_head / problem.group_size; }
};

// At most `most` rows from `first` on.
RowSpan make_span(const Problem& problem, std::int64_t batch, std::int64_t first_head, std::int64_t heads,
                  std::int64_t first, std::int64_t most);

struct RowIndex {
  std::int64_t query, head;
};

inline RowIndex row_index(const RowSpan& span, std::int64_t i) {
  const std::int64_t row = span.first + i;
  return {row / span.heads, span.first_head + row % span.heads};
}

// The index of the row after this one. Loops over rows use it, since row_index divides.
inline RowIndex next_row(const RowSpan& span, RowIndex index) {
  if (++index.head < span.first_head + span.heads) return index;
  return {index.query + 1, span.first_head};
}

// The first element of an operand's row for a query and head.
inline char* element(const Problem& problem, const Operand& operand, const RowSpan& span, RowIndex index) {
  return problem.at(operand, span.batch) + index.head * operand.head + index.query * operand.row;
}

// The range of the keys that at least one valid row of the span may see, before mask and bias. The operands hold all
// keys of the range.
KeyRange span_keys(const Problem& problem, const RowSpan& span);

// A row's mask at its first column, or null.
const std::uint8_t* mask_of(const Problem& problem, const RowSpan& span, RowIndex index);

// The head's sink in units of log2, or -inf.
double sink_of(const Problem& problem, std::int64_t head);

// Describes a row, but sets the addresses of query, relative products, out and scores to null.
Row describe_row(const Problem& problem, const RowSpan& span, RowIndex index, const ValidKeys& valid);

// Describes every valid row of the span.
void describe_rows(const Problem& problem, const RowSpan& span, Row* rows);

// Copies the query of row i of the span, and adds its head's row of `bias`, if there is one. The elements of `to` are
// contiguous.
void gather_query(const Problem& problem, const KernelSet& kernels, const RowSpan& span, std::int64_t i,
                  const PerHead& bias, const TargetRow& to);

// How products become scores, the same for every row.
Scoring scoring_of(const Problem& problem);

}  // namespace selfattn
