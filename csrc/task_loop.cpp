#include "task_loop.h"

#include <algorithm>

namespace selfattn {
namespace {

// A thread must get this much work, or waking it costs more than it saves: at least 50 us for a team of two.
constexpr double seconds_per_thread = 25e-6;
// What one core of a current server computes in float32 and reads from its last cache level.
constexpr double flops_per_second = 100e9;
constexpr double bytes_per_second = 25e9;

}  // namespace

int useful_threads(double flops, double bytes, std::int64_t tasks, int num_threads) {
  const double seconds = std::max(flops / flops_per_second, bytes / bytes_per_second);
  const double useful = std::min(seconds / seconds_per_thread, static_cast<double>(tasks));
  if (useful < 2) return 1;
  const int limit = num_threads > 0 ? num_threads : default_threads().count;
  return std::max(std::min(limit, static_cast<int>(std::min(useful, 1e6))), 1);
}

}  // namespace selfattn
