#include "task_loop.h"

#include <algorithm>

namespace selfattn {
namespace {

using Clock = std::chrono::steady_clock;

// The least work per thread: with less, waking the thread costs more than it saves. A team of two thus needs at least
// 50 us of work.
constexpr double seconds_per_thread = 25e-6;
// The same if the team is still awake from the call before.
constexpr double seconds_per_awake_thread = 10e-6;
// How long idle threads of a team spin before they sleep (selfattn/_idle.py).
constexpr std::chrono::microseconds awake{10};
// The rates of one core of a current server, in float32 and for reads from the last-level cache.
constexpr double flops_per_second = 100e9;
constexpr double bytes_per_second = 25e9;

// End of the calling thread's last call, counted from the clock's epoch. Each thread has its own team.
thread_local constinit Clock::rep last_end = 0;

}  // namespace

void note_end_of_call() { last_end = Clock::now().time_since_epoch().count(); }
void forget_last_call() { last_end = 0; }

int useful_threads(double flops, double bytes, std::int64_t tasks, int num_threads) {
  const double seconds = std::max(flops / flops_per_second, bytes / bytes_per_second);
  if (seconds < 2 * seconds_per_awake_thread) return 1;
  const bool is_awake = Clock::now().time_since_epoch() - Clock::duration(last_end) < awake;
  const double useful =
      std::min(seconds / (is_awake ? seconds_per_awake_thread : seconds_per_thread), static_cast<double>(tasks));
  if (useful < 2) return 1;
  const int limit = num_threads > 0 ? num_threads : default_threads().count;
  return std::max(std::min(limit, static_cast<int>(std::min(useful, 1e6))), 1);
}

}  // namespace selfattn
