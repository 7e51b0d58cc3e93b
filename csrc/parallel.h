// Runs a piece of work on several threads at once. The only place that knows OpenMP; safe after fork.
#pragma once
#include <atomic>
#include <cstdint>

namespace selfattn {

// `work(context, slot)` runs once on each thread of the team, which may turn out smaller than asked for; slots are
// 0, 1, ... and unique within the region. It must not throw. `poll(context)` is called on the calling thread when
// that thread only waits; otherwise `work` polls for itself where `slot` is `caller_slot`.
struct Region {
  void (*work)(void* context, int slot) noexcept;
  void (*poll)(void* context) noexcept;
  void* context;
};

constexpr int caller_slot = 0;

void run_region(const Region& region, int num_threads);

// Threads that a call may use by default: the least of OpenMP's setting in this thread, the CPUs that the process may
// run on and its control group's quota rounded up; `source` says which one decided.
struct ThreadDefault {
  int count;
  const char* source;
};
ThreadDefault default_threads();

void set_default_threads(int count);  // 0: as detected

// Another library's OpenMP runtime, by two of its functions: what GCC calls to run a region (function, its argument,
// threads, flags), and the number of threads that the calling thread's regions have by default.
struct Runtime {
  void (*run)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*threads)() = nullptr;
};
void share_runtime(Runtime runtime);  // from now on regions run there; none: in our own again

const char* parallel_backend();  // "openmp", "shared openmp", "threads" or "serial"

// Registers the fork handler; called once, when the module is loaded.
void prepare_for_fork();

// Whether a region of so many threads, started here, runs on a helper thread while the caller waits and polls.
bool runs_on_helper(int num_threads);

}  // namespace selfattn
