// The feed-forward half of a layer, and what it shares with the attention half.
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

double flops(const FeedForwardJob& job);
bool run_feed_forward(const FeedForwardJob& job, int num_threads, Interrupted interrupted);

}  // namespace selfattn
