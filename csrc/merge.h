// Merges attention over disjoint parts of the keys: lse = log sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p.
#pragma once
#include <span>

#include "kernels/kernel_set.h"
#include "task_loop.h"
#include "tensor_view.h"

namespace selfattn {

// The result of attention over some of the keys: out (..., rows, columns) and lse (..., rows), with any strides.
struct State {
  TensorView out, lse;
};

// All shapes must agree. `merged` may be one of the parts, but must not overlap the parts in any other way. Sums are
// computed in double, in the order of the parts. Returns false if interrupted.
bool merge_states(const KernelSet& kernels, std::span<const State> parts, const State& merged, int num_threads,
                  Interrupted interrupted);

}  // namespace selfattn
