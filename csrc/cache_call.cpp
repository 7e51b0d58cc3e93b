#include "cache_call.h"

#include "attend.h"

namespace selfattn {

RotatedTokens::RotatedTokens(const TensorView& like, Layout layout)
    : memory_(static_cast<std::size_t>(
          bytes_of(like.shape[0], like.shape[1], like.shape[2], like.shape[3], size_of(like.dtype)))),
      view_{memory_.data(), like.dtype, 4, like.shape, strides_} {
  // The tokens of a head are contiguous, which suits the kernels.
  const int token = layout == Layout::bshd ? 1 : 2, head = 3 - token;
  strides_[3] = size_of(like.dtype);
  strides_[token] = strides_[3] * like.shape[3];
  strides_[head] = strides_[token] * like.shape[token];
  strides_[0] = strides_[head] * like.shape[head];
}

CacheCall::CacheCall(CacheStep& step, const CacheInputs& inputs, const AttentionArguments& arguments)
    : step_(step), inputs_(inputs), layout_(arguments.layout), problem_(step.problem_of(with_queries(arguments))) {}

AttentionArguments CacheCall::with_queries(AttentionArguments arguments) {
  arguments.q = inputs_.rope ? query_.emplace(inputs_.q, layout_).view() : inputs_.q;
  if (inputs_.rope && inputs_.k) key_.emplace(inputs_.k, layout_);
  return arguments;
}

bool CacheCall::rotate(int num_threads, Interrupted interrupted) const {
  const TokensView query(inputs_.q, layout_), rotated_query(query_->view(), layout_);
  const std::int64_t* ends = step_.lengths_after();
  const Rotation queries{query.view, rotated_query.view, inputs_.positions, ends};
  if (!key_) return selfattn::rotate(*inputs_.rope, &queries, 1, num_threads, interrupted);
  const TokensView key(inputs_.k, layout_), rotated_key(key_->view(), layout_);
  const Rotation both[] = {queries, {key.view, rotated_key.view, inputs_.positions, ends}};
  return selfattn::rotate(*inputs_.rope, both, 2, num_threads, interrupted);
}

bool CacheCall::run(const Plan& plan, int num_threads, Interrupted interrupted) const {
  // Called before rotate(), because this number depends on the time since the end of the last call, and rotate() takes
  // time.
  const int threads = threads_for(plan, num_threads);
  if (inputs_.rope && !rotate(num_threads, interrupted)) return false;
  if (inputs_.k) {
    const TokensView keys(key_ ? key_->view() : inputs_.k, layout_), values(inputs_.v, layout_);
    step_.store(*plan.kernels, keys.view, values.view);
  }
  return attend(problem_, plan, threads, interrupted);
}

}  // namespace selfattn
