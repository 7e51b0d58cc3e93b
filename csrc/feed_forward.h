// The feed-forward half of a transformer layer, and run_normalised, which the attention half (layer.h) uses, too.
#pragma once
#include <optional>

#include "linear.h"

namespace selfattn {

struct LinearWeights {
  Projection projection;
  std::optional<Projection> gate;
  Activation activation;
};

// Runs a job. If `norm` is not null, the result is the norm of product + residual. Returns false if interrupted.
bool run_normalised(const LinearJob& job, const Norm* norm, int num_threads, Interrupted interrupted);

// out = post_norm(second(first(norm(x))) + residual), where either norm may be null.
struct FeedForwardJob {
  const LinearWeights& first;
  const LinearWeights& second;
  const Norm* norm;
  const Norm* post_norm;
  RowsView x;
  const RowsView* residual;  // null: none
  char* out;                 // contiguous
  DType dtype;               // of out
};

class FeedForward {
 public:
  explicit FeedForward(const FeedForwardJob& job);
  // Returns false if interrupted.
  bool run(int num_threads, Interrupted interrupted) const;
  friend double flops(const FeedForward& network) { return flops(network.first_) + flops(network.second_); }

 private:
  const FeedForwardJob job_;
  // The products for all rows. The pointers to the result of the first product are null until run() allocates memory.
  const LinearJob first_, second_;
};

}  // namespace selfattn
