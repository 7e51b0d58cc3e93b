// The whole mechanism in one call: projections of x to queries, keys and values, attention, output projection.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "problem.h"
#include "projection.h"
#include "rope.h"
#include "task_loop.h"

namespace selfattn {

struct LayerWeights {
  const KernelSet* kernels;
  DType dtype;
  std::int64_t num_heads, num_kv_heads, head_dim, value_dim;
  Projection query, key, value;
  std::optional<Projection> output;
  std::optional<Rope> rope;
};

// One call of a layer. The arguments' q, k and v are set here; everything else is the caller's.
class LayerCall {
 public:
  // `context` may be absent. Throws like make_problem; allocates all memory.
  LayerCall(const LayerWeights& layer, const TensorView& x, const TensorView& context, const TensorView& positions,
            AttentionArguments arguments);
  ~LayerCall();
  Problem& problem();  // to attach lse and weights
  Shape out_shape() const;
  double flops() const;
  // False: interrupted.
  bool run(const TensorView& out, int num_threads, Interrupted interrupted);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace selfattn
