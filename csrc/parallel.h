// Runs work on a team of threads. The only place that calls OpenMP. Safe after fork.
#pragma once
namespace selfattn {

// `work(context, thread)` runs once on each thread of the team; `thread` counts the threads of the region from 0.
// `work` must not throw. If all of `work` runs on other threads, the calling thread waits and calls `poll(context)`
// from time to time. Otherwise `work` must poll by itself when it runs as `caller_thread`.
struct Region {
  void (*work)(void* context, int thread) noexcept;
  void (*poll)(void* context) noexcept;
  void* context;
};

constexpr int caller_thread = 0;

// Returns the size chosen for the team. It may be less than num_threads if other threads of this process are in
// regions: all teams together should not have more threads than the default number, but each team has at least its
// calling thread. If threads cannot be started, the team is smaller than the returned size.
int run_region(const Region& region, int num_threads);

// Default number of threads of a call: the number given to set_default_threads or, without one, the least of four
// limits. These are OpenMP's setting in this thread, the hardware's threads, the CPUs in this thread's affinity, and
// the control group's quota, rounded up. `source` names the limit that decided.
struct ThreadDefault {
  int count;
  const char* source;
};
ThreadDefault default_threads();

void set_default_threads(int count);  // 0: none, so that the limits decide

// Another library's OpenMP runtime, given by two of its functions: GOMP_parallel (function, argument of the function,
// number of threads, flags) and omp_get_max_threads.
struct Runtime {
  void (*run)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*threads)() = nullptr;
};
void share_runtime(Runtime runtime);  // used for later regions; null functions: our own runtime

const char* parallel_backend();  // "openmp", "shared openmp", "threads" or "serial"

// Registers the fork handler. Call it once, when the module is loaded.
void prepare_for_fork();

}  // namespace selfattn
