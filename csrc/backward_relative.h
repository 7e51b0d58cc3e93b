// The backward pass of relative products: gradients through the products of queries and the vectors of distances.
#pragma once
#include "backward_memory.h"
#include "backward_rows.h"

namespace selfattn {

// Consecutive blocks of a head share most distances. A task therefore keeps its sums in an array with one column for
// each distance of the current block. For a block of n rows and `count` keys, these columns of the array are used:
//
//   [block_rows - n, block_rows)             distances that no earlier row had
//   [block_rows, block_rows + count - 1)     distances that the preceding block had, too
//
// No later block of the task has the distances of the last n columns. After each block, the task adds these n columns
// to the head's part of Gradients::relative, and moves all remaining columns up by n indices. So when a task has
// finished a block, it has added its sums for all distances from queries of that block to keys of the next range. The
// task of the next range waits for this, so that the order of sums is fixed.
template <class T>
class RelativeSums {
 public:
  RelativeSums(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan)
      : problem_(problem), gradients_(gradients), plan_(plan) {}

  // Clears the thread's sums.
  void start(const BackwardThreadMemory& memory) const;
  // Computes the gradients of a block of rows and adds them to the thread's sums. Before the call, memory.dquery holds
  // the gradients of queries through q.k. The call writes the gradients of queries through relative products to
  // memory.relative.dquery.
  void visit(BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const;
  // Adds sums to the head's gradients: the sums that no later block will change. Called after every block, visited or
  // skipped.
  void deliver(BackwardTask& task, const RowSpan& span, bool last_of_head, const BackwardThreadMemory& memory) const;

 private:
  void multiply(const BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const;
  void add_column(const RowSpan& span, std::int64_t distance, T* sums, const BackwardThreadMemory& memory) const;
  void deliver_head(const RowSpan& span, const BackwardThreadMemory& memory) const;

  const Problem& problem_;
  const Gradients& gradients_;
  const BackwardPlan& plan_;
};

}  // namespace selfattn
