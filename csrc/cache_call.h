// Attention over a cache in one call: queries and new keys are rotated, new tokens are stored, and the queries attend
// to all that the cache then holds.
#pragma once
#include <optional>

#include "cache_step.h"
#include "plan.h"
#include "rope.h"

namespace selfattn {

struct CacheInputs {
  TensorView q, k, v;  // (batch, heads, tokens, width), or in layout bshd; k and v may be absent
  TensorView positions;
  std::optional<Rope> rope;
};

// Contiguous memory for what a view (batch, heads, tokens, width) shows, in the view's layout.
class RotatedTokens {
 public:
  RotatedTokens(const TensorView& like, bool bshd);
  RotatedTokens(const RotatedTokens&) = delete;  // the view points to its own object
  RotatedTokens& operator=(const RotatedTokens&) = delete;
  const TensorView& view() const { return view_; }

 private:
  const Scratch memory_;
  std::int64_t strides_[4];
  const TensorView view_;
};

class CacheCall {
 public:
  // Shapes of q, k and v fit the cache; everything else is checked here as make_problem does. Allocates all memory.
  CacheCall(CacheStep& step, const CacheInputs& inputs, const AttentionArguments& arguments);
  Problem& problem() { return problem_; }  // to attach outputs
  // False: interrupted.
  bool run(const Plan& plan, int num_threads, Interrupted interrupted) const;

 private:
  AttentionArguments placed(CacheStep& step, AttentionArguments arguments);
  bool rotate(int num_threads, Interrupted interrupted) const;

  const CacheStep& step_;
  const CacheInputs inputs_;
  const bool bshd_;
  std::optional<RotatedTokens> query_, key_;  // with rope
  Problem problem_;
};

}  // namespace selfattn
