// Computes the numbers that the kernel of the backward pass needs for each row. Runs before any key is visited.
#pragma once
#include "backward_memory.h"
#include "backward_rows.h"

namespace selfattn {

template <class T>
class RowPreparation {
 public:
  RowPreparation(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan,
                 const BackwardShared& shared)
      : problem_(problem), gradients_(gradients), plan_(plan), shared_(shared) {}

  // Fills in shift, factor and delta of a block of rows, and its gradients of sinks. Clears the gradients of queries
  // that no range task writes: those beyond q_lens, and all those of a block that sees no key.
  void prepare(const RowSpan& span, const BackwardThreadMemory& memory) const;

 private:
  // The largest magnitude of a log-sum-exp, in units of log2, from which a row's weights can be computed. Beyond this
  // limit, an ulp of the scores or of the log-sum-exp is 1/8 or more. Rows beyond the limit are treated like rows that
  // see no key. In practice, these are only padding: rows whose biases are all the lowest finite float.
  double largest_peak() const {
    return sizeof(T) == sizeof(float) || problem_.lse.dtype == DType::f32 ? 0x1p20 : 0x1p49;
  }

  const Problem& problem_;
  const Gradients& gradients_;
  const BackwardPlan& plan_;
  const BackwardShared shared_;
};

}  // namespace selfattn
