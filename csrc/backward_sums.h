// Sums the gradients of scores. The sums are the gradients of the terms that are added to scores.
#pragma once
#include "backward_memory.h"
#include "backward_rows.h"

namespace selfattn {

// The gradients of the scores of one block are in memory.dscores.
template <class T>
class ScoreSums {
 public:
  ScoreSums(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan)
      : problem_(problem), gradients_(gradients), plan_(plan) {}

  // Adds the block's share to the gradients of a bias that has an axis of keys, and to the thread's sums by distance.
  void add_scores(const BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const;
  // Adds the block's share to the gradients that have one number per row: those of the scale, of ALiBi slopes, and of a
  // bias without an axis of keys.
  void add_rows(const BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const;
  // Adds the thread's sums by distance to the sums of the head, and clears the thread's sums.
  void deliver_distances(const RowSpan& span, const BackwardThreadMemory& memory) const;

 private:
  void add_distances(const BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const;
  void multiply_rows(const RowSpan& span, const BackwardThreadMemory& memory, double* sums) const;

  // The distance in the first column of a block, see add_distances. It falls by 1 from column to column.
  std::int64_t farthest(const BackwardTask& task, const RowSpan& span) const {
    return row_index(span, span.valid - 1).query + problem_.offset_of(span.batch) - task.first;
  }

  const T* dscores_of(const BackwardThreadMemory& memory, int row) const {
    return reinterpret_cast<const T*>(memory.dscores) + row * plan_.score_stride;
  }

  const Problem& problem_;
  const Gradients& gradients_;
  const BackwardPlan& plan_;
};

}  // namespace selfattn
