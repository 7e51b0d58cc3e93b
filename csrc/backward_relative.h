// The relative half of the backward pass: gradients through the products of queries and the vectors of distances.
#pragma once
#include "backward_memory.h"
#include "backward_rows.h"

namespace selfattn {

// Consecutive blocks of a head share most distances. So a task sums the gradients of their vectors in a window, which
// moves on with the rows. For a block of n rows against `count` keys it has the
//
//   columns [block_rows - n, block_rows)             distances that no earlier row had
//   columns [block_rows, block_rows + count - 1)     those that it shares with the preceding block
//
// The distances of the last n columns then do not occur again in this task. They are added to the head's gradient, and
// the other columns move n further. A task that has passed a block has added all distances that the next range of keys
// has in that block. If that range waits for this, sums have a fixed order.
template <class T>
class RelativeSums {
 public:
  RelativeSums(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan)
      : problem_(problem), gradients_(gradients), plan_(plan) {}

  // Clears the slot's sums.
  void start(const BackwardSlot& slot) const;
  // Computes the gradients of a block of rows and adds them to the slot's sums. The gradients of queries through q.k
  // are in slot.dquery already; those through relative products are left in slot.relative.dquery.
  void visit(BackwardTask& task, const RowSpan& span, const BackwardSlot& slot) const;
  // Adds what is complete after a block, visited or not, to the head's gradients.
  void deliver(BackwardTask& task, const RowSpan& span, bool last_of_head, const BackwardSlot& slot) const;

 private:
  void multiply(const BackwardTask& task, const RowSpan& span, const BackwardSlot& slot) const;
  void add_column(const RowSpan& span, std::int64_t distance, T* sums, const BackwardSlot& slot) const;
  void deliver_head(const RowSpan& span, const BackwardSlot& slot) const;

  const Problem& problem_;
  const Gradients& gradients_;
  const BackwardPlan& plan_;
};

}  // namespace selfattn
