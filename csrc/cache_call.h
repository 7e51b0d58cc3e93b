// One call of attention over a cache: rotates queries and new keys, stores the new tokens, and lets the queries attend
// to everything that the cache then holds.
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

// A buffer for the elements of a view with the axes (batch, heads, tokens, width), or (batch, tokens, heads, width) in
// layout bshd. view() has the same axes, but each head's tokens are contiguous in memory.
class RotatedTokens {
 public:
  RotatedTokens(const TensorView& like, Layout layout);
  RotatedTokens(const RotatedTokens&) = delete;  // the view points into this object
  RotatedTokens& operator=(const RotatedTokens&) = delete;
  const TensorView& view() const { return view_; }

 private:
  const Scratch memory_;
  std::int64_t strides_[4];
  const TensorView view_;
};

class CacheCall {
 public:
  // The shapes of q, k and v must fit the cache. Checks everything else as make_problem does. Allocates the rotated
  // queries and keys.
  CacheCall(CacheStep& step, const CacheInputs& inputs, const AttentionArguments& arguments);
  Problem& problem() { return problem_; }  // to attach outputs
  // Returns false if interrupted. Throws std::bad_alloc.
  bool run(const Plan& plan, int num_threads, Interrupted interrupted) const;

 private:
  AttentionArguments with_queries(AttentionArguments arguments);
  bool rotate(int num_threads, Interrupted interrupted) const;

  const CacheStep& step_;
  const CacheInputs inputs_;
  const Layout layout_;
  std::optional<RotatedTokens> query_, key_;  // only with rope
  Problem problem_;
};

}  // namespace selfattn
