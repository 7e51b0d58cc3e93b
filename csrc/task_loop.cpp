#include "task_loop.h"

#include <algorithm>

namespace selfattn {
namespace {

// What a second thread costs is repaid by this much work; the two rates only turn work into time.
constexpr double seconds_per_thread = 10e-6;
constexpr double flops_per_second = 50e9;
constexpr double bytes_per_second = 10e9;

}  // namespace

int useful_threads(double flops, double bytes, std::int64_t tasks, int num_threads) {
  const double seconds = std::max(flops / flops_per_second, bytes / bytes_per_second);
  const double useful = std::min(seconds / seconds_per_thread, static_cast<double>(tasks));
  if (useful < 2) return 1;
  const int limit = num_threads > 0 ? num_threads : default_threads().count;
  return std::max(std::min(limit, static_cast<int>(std::min(useful, 1e6))), 1);
}

}  // namespace selfattn
