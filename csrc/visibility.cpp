#include "problem.h"

#include <algorithm>
#include <cstring>

namespace selfattn {
namespace {

// Larger than any length, yet small enough that the sum of two such numbers cannot overflow.
constexpr std::int64_t far = std::int64_t{1} << 60;

std::int64_t clamp_far(std::int64_t n) { return std::clamp(n, -far, far); }

// a + b, clamped.
std::int64_t far_sum(std::int64_t a, std::int64_t b) {
  std::int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? (b < 0 ? -far : far) : clamp_far(sum);
}

}  // namespace

std::int64_t integer_at(const char* p) {
  std::int64_t n;
  std::memcpy(&n, p, sizeof n);
  return n;
}

std::int64_t Problem::keys_of(std::int64_t b) const { return kv_lens ? integer_at(at(kv_lens, b)) : kv_len; }

std::int64_t Problem::prefix_of(std::int64_t b) const { return prefix_lens ? integer_at(at(prefix_lens, b)) : 0; }

std::int64_t Problem::start_of(std::int64_t b) const { return kv_starts ? integer_at(at(kv_starts, b)) : 0; }

std::int64_t Problem::masked_from(std::int64_t b) const { return recent_mask ? keys_of(b) - q_len : 0; }

std::int64_t Problem::queries_of(std::int64_t b) const { return q_lens ? integer_at(at(q_lens, b)) : q_len; }

std::int64_t Problem::exact_offset_of(std::int64_t b) const {
  return q_offset ? integer_at(at(q_offset, b)) : keys_of(b) - queries_of(b);
}

std::int64_t Problem::offset_of(std::int64_t b) const { return clamp_far(exact_offset_of(b)); }

VisibleDistances visible_distances(const Problem& problem) {
  VisibleDistances distances;
  if (problem.window_right >= 0) distances.least = -problem.window_right;
  if (problem.causal) distances.least = 0;
  if (problem.window_left >= 0) distances.most = problem.window_left;
  return distances;
}

ValidKeys valid_keys(const Problem& problem, std::int64_t b) {
  const std::int64_t offset = problem.exact_offset_of(b);
  const VisibleDistances distances = visible_distances(problem);
  ValidKeys valid{problem.start_of(b), problem.keys_of(b),  clamp_far(offset), -far, far,
                  problem.chunk,       problem.prefix_of(b)};
  // Offset and distance may cancel, so they are added exactly, and only the sum is clamped.
  if (distances.most) valid.first = far_sum(offset, -*distances.most);
  if (distances.least) valid.last = far_sum(offset, -*distances.least);
  return valid;
}

}  // namespace selfattn
