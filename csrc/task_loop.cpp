#include "task_loop.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

namespace selfattn {

thread_local constinit Rehearsal* Rehearsal::active_ = nullptr;

namespace {

using Clock = std::chrono::steady_clock;
using Estimate = std::atomic<float>;

// All times are in seconds. The least work per thread, whatever the estimates are: a team of two needs at least 50 us
// of work, or 20 us if it is still awake.
constexpr double least_asleep = 25e-6;
constexpr double least_awake = 10e-6;
// Longer work always gets all threads.
constexpr double long_enough = 1e-3;
// A team counts as awake if less than this time has passed since its last region ended. A call follows the last call
// immediately if less than this time has passed since that call ended. Idle threads spin for at least this time before
// they sleep (selfattn/_idle.py).
constexpr std::chrono::microseconds at_once{10};
// How many calls must follow one another immediately to form a loop.
constexpr int loop_calls = 8;

// The rates of one core of a current server: float32 operations, and bytes read from the last-level cache. They give a
// first guess of the time that work takes. Measured times are divided by this guess.
constexpr double flops_per_second = 100e9;
constexpr double bytes_per_second = 25e9;

// The measured time of a kernel's work divided by the guess, for each kernel and size of work; 0: not known. Kinds of
// work whose hashes agree share an entry and mix their estimates. Results do not depend on the estimates.
std::array<Estimate, 256> slowness;

double guess(const Work& work) { return std::max(work.flops / flops_per_second, work.bytes / bytes_per_second); }

Estimate& slowness_of(const Work& work) {
  const auto kernel = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(work.kernel));
  const auto size = static_cast<std::uint64_t>(std::ilogb(guess(work)));
  return slowness[((kernel >> 3) * 31 + size) * 0x9e3779b97f4a7c15 >> 56];
}

// Time that the work takes on one thread.
double expected(const Work& work) {
  const float slower = slowness_of(work).load(std::memory_order_relaxed);
  return guess(work) * (slower > 0 ? static_cast<double>(slower) : 1);
}

// The time that a team needs in addition to its share of the work. For each power of two of the team's size there are
// two estimates: for a team that was asleep, and for one that was awake.
constexpr double wake_asleep = 25e-6, wake_awake = 3e-6;  // the first guess, and the least estimate
struct Wake {
  Estimate asleep{static_cast<float>(wake_asleep)}, awake{static_cast<float>(wake_awake)};
};
std::array<Wake, 32> wakes;

Estimate& wake_of(int team, bool is_awake) {
  Wake& wake = wakes[static_cast<std::size_t>(std::bit_width(static_cast<unsigned>(team))) - 1];
  return is_awake ? wake.awake : wake.asleep;
}

// Moves an estimate towards a measured value. If a thread loses its core during a region, the measured value is many
// times too high, so it counts as at most twice the estimate.
void follow(Estimate& estimate, double seen) {
  const double old = static_cast<double>(estimate.load(std::memory_order_relaxed));
  estimate.store(static_cast<float>(old + (std::min(seen, 2 * old) - old) / 4), std::memory_order_relaxed);
}

// What is known of the calling thread, which has its own team. Times are counted from the clock's epoch.
struct Rhythm {
  Clock::rep region_end = 0;  // of the last region with a team
  Clock::rep call_end = 0;
  int calls_in_row = 0;
  bool in_call = false;
};
thread_local constinit Rhythm rhythm;

bool follows(Clock::time_point now, Clock::rep end) { return now.time_since_epoch() - Clock::duration(end) < at_once; }

// Whether a team is expected to be awake, now or in the next calls of a loop.
bool expects_awake() {
  const Clock::time_point now = Clock::now();
  if (!rhythm.in_call) {
    rhythm.in_call = true;
    rhythm.calls_in_row = follows(now, rhythm.call_end) ? std::min(rhythm.calls_in_row + 1, loop_calls) : 0;
  }
  return rhythm.calls_in_row == loop_calls || follows(now, rhythm.region_end);
}

// The team, of at most `limit` threads, that is expected to finish first.
int best_team(double seconds, int limit, bool is_awake) {
  int best = 1;
  double least = seconds;
  for (int team = limit; team > 1; team /= 2) {
    Estimate& wake = wake_of(team, is_awake);
    const double cost = seconds / team + static_cast<double>(wake.load(std::memory_order_relaxed));
    if (cost < least) {
      least = cost;
      best = team;
    }
  }
  if (best > 1 || limit <= 1) return best;
  // If the team is not used, the estimate of its cost falls a little each time, until the team is tried again: its cost
  // may have changed.
  Estimate& wake = wake_of(limit, is_awake);
  const float cheaper = wake.load(std::memory_order_relaxed) * (1 - 1.0F / 128);
  wake.store(std::max(cheaper, static_cast<float>(is_awake ? wake_awake : wake_asleep)), std::memory_order_relaxed);
  return 1;
}

}  // namespace

void note_end_of_call() {
  rhythm.call_end = Clock::now().time_since_epoch().count();
  rhythm.in_call = false;
}

void forget_last_call() { rhythm = {}; }

int useful_threads(const Work& work, int num_threads) {
  const double seconds = expected(work);
  if (seconds < 2 * least_awake) return 1;
  const bool is_awake = expects_awake();
  const double useful = std::min(seconds / (is_awake ? least_awake : least_asleep), static_cast<double>(work.tasks));
  if (useful < 2) return 1;
  const int limit =
      std::min(num_threads > 0 ? num_threads : default_threads().count, static_cast<int>(std::min(useful, 1e6)));
  if (num_threads > 0 || seconds >= long_enough) return std::max(limit, 1);
  return best_team(seconds, limit, is_awake);
}

void TaskLoop::learn(Clock::time_point start, int used, bool finished) const {
  const bool was_awake = follows(start, rhythm.region_end);
  if (used == 1 && guess(work_) < 1e-6) return;  // too short to be worth reading the clock
  const Clock::time_point end = Clock::now();
  if (used > 1) rhythm.region_end = end.time_since_epoch().count();
  if (!finished || own_.tasks == 0) return;
  if (guess(work_) <= 0) return;  // no operations and no bytes: the time cannot be divided by 0
  const std::chrono::duration<double> own = own_.time, all = end - start;
  const double alone = own.count() * static_cast<double>(work_.tasks) / static_cast<double>(own_.tasks);
  Estimate& slower = slowness_of(work_);
  if (slower.load(std::memory_order_relaxed) > 0)
    follow(slower, alone / guess(work_));
  else
    slower.store(static_cast<float>(alone / guess(work_)), std::memory_order_relaxed);
  const double seconds = expected(work_);
  if (used > 1 && seconds < long_enough)
    follow(wake_of(used, was_awake), std::max(all.count() - seconds / used, was_awake ? wake_awake : wake_asleep));
}

}  // namespace selfattn
