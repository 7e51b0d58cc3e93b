// The relative half of the backward pass: gradients through the products of queries and the vectors of distances.
#pragma once
#include "backward_memory.h"
#include "backward_rows.h"

namespace selfattn {

// Consecutive blocks of a head share most distances. A task therefore keeps the sums of a block's distances in a window
// of columns, one for each distance. For a block of n rows and `count` keys the columns are
//
//   [block_rows - n, block_rows)             distances that no earlier row had
//   [block_rows, block_rows + count - 1)     distances that the preceding block had, too
//
// No later block of the task has the distances of the last n columns. After each block these n columns are added to the
// head's part of Gradients::relative, and the other columns move up by n. So when a task has finished a block, it has
// added its sums for every distance between that block and the next range of keys. The task of the next range waits for
// this, so that the order of sums is fixed.
template <class T>
class RelativeSums {
 public:
  RelativeSums(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan)
      : problem_(problem), gradients_(gradients), plan_(plan) {}

  // Clears the thread's sums.
  void start(const BackwardThreadMemory& memory) const;
  // Computes the gradients of a block of rows and adds them to the thread's sums. The gradients of queries through q.k
  // are in memory.dquery already; the gradients of queries through relative products are left in
  // memory.relative.dquery.
  void visit(BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const;
  // Adds to the head's gradients those sums that no later block will change. Called after every block, visited or
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
