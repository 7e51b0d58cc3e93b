// Merges attention over disjoint parts of the keys: lse = log sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p.
#pragma once
#include <span>

#include "kernels/kernel_set.h"
#include "task_loop.h"
#include "tensor_view.h"

namespace selfattn {

// What attention over some of the keys gave: out (..., rows, columns) and lse (..., rows), in any strides.
struct State {
  TensorView out, lse;
};

// All shapes agree. `merged` may be one of the parts and shares no other memory with them. Sums are double and in the
// order of the parts. Returns false if it was interrupted.
bool merge_states(const KernelSet& kernels, std::span<const State> parts, const State& merged, int num_threads,
                  Interrupted interrupted);

}  // namespace selfattn
