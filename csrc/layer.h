// An attention layer in one call: projects x (or x and a context) to queries, keys and values, then computes attention,
// then applies the output projection.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "cache_step.h"
#include "feed_forward.h"
#include "problem.h"
#include "rope.h"
#include "scratch_pool.h"
#include "task_loop.h"

namespace selfattn {

// The norm of queries or keys, between projection and rotation.
struct HeadNorm {
  const Norm* norm = nullptr;  // null: none
  std::int64_t count = 0;      // numbers that are normalised together: a head, or all heads of a token
};

struct LayerWeights {
  const KernelSet* kernels;
  DType dtype;
  std::int64_t num_heads, num_kv_heads, head_dim, value_dim;
  Projection query, key, value;
  std::optional<Projection> output;
  std::optional<Rope> rope;
  const Norm* norm;       // of x; null: none
  const Norm* post_norm;  // of the result
  HeadNorm query_norm, key_norm;
};

// A view of a C-contiguous buffer with axes (batch..., length, heads, dim). The axes batch... and length are those of
// x.
struct BufferView {
  std::int64_t shape[max_axes], strides[max_axes];
  TensorView view;

  BufferView(char* data, DType dtype, const TensorView& x, std::int64_t heads, std::int64_t dim);
  BufferView(const BufferView&) = delete;  // the view points into this object
  BufferView& operator=(const BufferView&) = delete;
  char* data() const { return static_cast<char*>(view.data); }
};

// The memory of queries, keys and values between the projections and attention.
struct LayerMemory {
  char *query, *key, *value;
  std::size_t bytes;

  LayerMemory(char* base, const LayerWeights& layer, std::int64_t query_rows, std::int64_t key_rows);
};

// One call of a layer. It always sets the attention arguments q, k, v and layout. If there is neither a cache nor a
// context, it also sets same_tokens and the default of q_offset. If the weights are multiplied as pairs of bfloat16, it
// also sets the precision. The caller sets the other options.
class LayerCall {
 public:
  // `context` may be absent, and `step` null. With a step, x is (batch, tokens, d_model): its tokens are appended to
  // the cache and attend to everything that the cache then holds. Throws like make_problem and CacheStep::problem_of.
  // Allocates the buffers for intermediate results.
  LayerCall(const LayerWeights& layer, const TensorView& x, const TensorView& context, const TensorView& positions,
            CacheStep* step, AttentionArguments arguments);
  Problem& problem() { return problem_; }  // to attach lse and weights
  Shape out_shape() const;
  double flops() const;
  // `out` must be C-contiguous. The residual has the shape and type of `out`, or is absent. Returns false if
  // interrupted. Throws std::bad_alloc.
  bool run(const TensorView& out, const TensorView& residual, int num_threads, Interrupted interrupted);

 private:
  bool one_input() const { return context_.data == x_.data && context_.shape == x_.shape; }
  bool normalise(const HeadNorm& norm, const BufferView& heads, int num_threads, Interrupted interrupted) const;
  bool rotate(int num_threads, Interrupted interrupted) const;

  const LayerWeights& layer_;
  const DType dtype_;  // of the computation
  const TensorView x_, context_, positions_;
  const std::int64_t query_rows_, key_rows_;
  const CacheStep* const step_;
  const Scratch memory_;  // the results of the first three projections
  const LayerMemory inputs_;
  const BufferView query_, key_, value_;
  Problem problem_;
  std::optional<Scratch> heads_;  // the result of attention, before the output projection
};

}  // namespace selfattn
