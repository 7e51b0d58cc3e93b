#include "attend_case.h"

#include <cstring>
#include <utility>

namespace selfattn::native {
namespace {

Extents extents(const Shape& shape) { return {shape.extent, shape.extent + shape.ndim}; }

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void set_zeros(Array& array) {
  array.each([&](char* p) { std::memset(p, 0, static_cast<std::size_t>(size_of(array.dtype()))); });
}

// Memory for the gradients of terms by distance.
void attach_distances(const Problem& problem, GradientArrays& found, Gradients& gradients) {
  const std::int64_t heads = problem.batch * problem.num_heads;
  const auto doubles = [&](std::vector<double>& numbers, std::int64_t count) {
    numbers.resize(static_cast<std::size_t>(heads * count));
    return numbers.data();
  };
  if (problem.distance_bias) gradients.distance_bias = doubles(found.distance_bias, problem.distance_bias.count);
  if (!problem.relative) return;
  gradients.key_bias = doubles(found.key_bias, problem.head_dim);
  gradients.relative_bias = doubles(found.relative_bias, problem.head_dim);
  found.relative = Array(problem.dtype, {heads, problem.relative.count, problem.head_dim});
  set_zeros(found.relative);
  gradients.relative = static_cast<char*>(found.relative.view().data);
}

}  // namespace

bool same_bits(const Array& a, const Array& b) {
  if (static_cast<bool>(a) != static_cast<bool>(b)) return false;
  if (!a) return true;
  if (a.shape() != b.shape()) return false;
  for (std::int64_t i = 0; i < a.count(); ++i)
    if (std::memcmp(a.at(i), b.at(i), static_cast<std::size_t>(size_of(a.dtype()))) != 0) return false;
  return true;
}

AttentionArguments Case::arguments() const {
  AttentionArguments a = options;
  a.q = q.view();
  a.k = k.view();
  a.v = v.view();
  a.mask = mask.view();
  a.bias = bias.view();
  a.q_offset = q_offset.view();
  a.q_lens = q_lens.view();
  a.kv_lens = kv_lens.view();
  a.kv_starts = kv_starts.view();
  a.alibi_slopes = alibi_slopes.view();
  a.sinks = sinks.view();
  a.r = r.view();
  a.u = u.view();
  a.w = w.view();
  a.distance_bias = distance_bias.view();
  return a;
}

bool Results::operator==(const Results& other) const {
  return same_bits(out, other.out) && same_bits(lse, other.lse) && same_bits(weights, other.weights);
}

Results attach_results(const Case& c, Problem& problem) {
  Results results;
  results.out = Array(c.q.dtype(), extents(out_shape(problem)), c.out);
  attach_out(problem, results.out.view());
  if (c.lse) {
    results.lse = Array(problem.dtype, extents(lse_shape(problem)));
    attach_lse(problem, results.lse.view());
  }
  if (c.weights) {
    results.weights = Array(problem.dtype, extents(weights_shape(problem)));
    attach_weights(problem, results.weights.view());
  }
  return results;
}

Results compute(const Case& c, const KernelSet& kernels, int threads, Threads how, Interrupted interrupted) {
  return compute(c, c.arguments(), kernels, threads, how, interrupted);
}

Results compute(const Case& c, const AttentionArguments& arguments, const KernelSet& kernels, int threads, Threads how,
                Interrupted interrupted) {
  Problem problem = make_problem(arguments);
  Results results = attach_results(c, problem);
  results.plan = make_plan(problem, kernels);
  results.threads = how == Threads::forced ? threads : threads_for(results.plan, threads);
  results.finished = attend(problem, results.plan, results.threads, interrupted);
  return results;
}

bool GradientArrays::operator==(const GradientArrays& other) const {
  return same_bits(query, other.query) && same_bits(key, other.key) && same_bits(value, other.value) &&
         same_bits(scores, other.scores) && same_bits(relative, other.relative) && same_bits(numbers, other.numbers) &&
         same_bits(key_bias, other.key_bias) && same_bits(relative_bias, other.relative_bias) &&
         same_bits(distance_bias, other.distance_bias);
}

GradientArrays differentiate(const Case& c, const KernelSet& kernels, int threads, Threads how, Interrupted interrupted,
                             Wanted wanted) {
  Problem problem = make_problem(c.arguments());
  const Results results = attach_results(c, problem);
  const Array lse(problem.dtype, extents(lse_shape(problem)));
  attach_lse(problem, lse.view());
  attend(problem, make_plan(problem, kernels), 1, nullptr);

  GradientArrays found;
  Gradients gradients;
  gradients.dout = problem.out;
  const auto rows = [&](Array& array, const Array& like, std::int64_t heads, std::int64_t length, std::int64_t dim) {
    array = Array(like.dtype(), extents(rows_shape(problem, heads, length, dim)));
    return place_rows(problem, array.view());
  };
  gradients.query = rows(found.query, c.q, problem.num_heads, problem.q_len, problem.head_dim);
  gradients.key = rows(found.key, c.k, problem.num_kv_heads, problem.kv_len, problem.head_dim);
  gradients.value = rows(found.value, c.v, problem.num_kv_heads, problem.kv_len, problem.value_dim);
  found.scores = Array(problem.dtype, {problem.q_len, problem.kv_len});
  set_zeros(found.scores);
  gradients.scores = place_scores(problem, found.scores.view());
  gradients.shares_scores = problem.batch * problem.num_heads > 1;
  const auto count = static_cast<std::size_t>(problem.batch * problem.num_heads * problem.q_len);
  found.numbers.resize(3 * count);
  gradients.scale = found.numbers.data();
  if (c.alibi_slopes) gradients.slopes = gradients.scale + count;
  if (c.sinks) gradients.sinks = gradients.scale + 2 * count;
  attach_distances(problem, found, gradients);
  if (wanted != Wanted::everything) {
    const Gradients all = std::exchange(gradients, {});
    gradients.dout = all.dout;
    if (wanted == Wanted::query) gradients.query = all.query;
    if (wanted == Wanted::key) gradients.key = all.key;
    if (wanted == Wanted::value) gradients.value = all.value;
  }
  const BackwardPlan plan = make_backward_plan(problem, gradients, kernels);
  const int used = how == Threads::forced ? threads : threads_for(plan, threads);
  found.finished = attend_backward(problem, gradients, plan, used, interrupted);
  return found;
}

}  // namespace selfattn::native
