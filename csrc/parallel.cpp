#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fork_helper.h"
#include "machine.h"

#if defined(SELFATTN_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define SELFATTN_HAS_FORK 1
#endif

namespace selfattn {
namespace {

enum class Backend { openmp, threads, serial };

Backend choose_backend() {
#if defined(SELFATTN_OPENMP)
  constexpr Backend built = Backend::openmp;
#else
  constexpr Backend built = Backend::threads;
#endif
  const char* name = std::getenv("SELFATTN_PARALLEL");
  if (!name || !*name) return built;
  if (std::strcmp(name, "serial") == 0) return Backend::serial;
  if (std::strcmp(name, "threads") == 0) return Backend::threads;
  constexpr bool has_openmp = built == Backend::openmp;
  if (has_openmp && std::strcmp(name, "openmp") == 0) return built;
  throw std::invalid_argument("SELFATTN_PARALLEL: '" + std::string(name) +
                              "' is not a back end of this build; available: " + (has_openmp ? "openmp, " : "") +
                              "threads, serial");
}

Backend backend() {
  static const Backend chosen = choose_backend();
  return chosen;
}

void run_threads(const Region& region, int num_threads) {
  std::vector<std::thread> others;
  try {
    others.reserve(static_cast<std::size_t>(num_threads - 1));
    for (int thread = 1; thread < num_threads; ++thread) others.emplace_back(region.work, region.context, thread);
  } catch (const std::exception&) {
    // No more threads, or no memory for them: the team stays smaller.
  }
  region.work(region.context, caller_thread);
  for (std::thread& other : others) other.join();
}

// Held while a team grows, so that no other thread of this process uses up the threads that startable_threads found.
std::mutex growth;

#if defined(SELFATTN_OPENMP)
struct Team {
  const Region& region;
  int num_threads;
  std::unique_lock<std::mutex> growing{};
  std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> next{caller_thread + 1};
  ThreadOnCpu last{};  // the thread that joined last
};

// The calling thread is caller_thread. The others draw their numbers from a counter, because OpenMP's thread numbers
// are unreliable if a process has two OpenMP runtimes.
void join(void* context) {
  Team& team = *static_cast<Team*>(context);
  const bool is_caller = std::this_thread::get_id() == team.caller;
  // The runtime starts all threads of a team before the caller gets here.
  if (is_caller && team.growing) team.growing.unlock();
  const int thread = is_caller ? caller_thread : team.next.fetch_add(1, std::memory_order_relaxed);
  if (thread < team.num_threads) team.region.work(team.region.context, thread);
  if (!is_caller && thread == team.num_threads - 1) team.last = ThreadOnCpu::of_this_thread();
}

std::atomic<const Runtime*> shared{nullptr};

// Number of threads, at most `count`, that this process can start now.
int startable_threads(int count) {
  std::mutex all_started;
  std::vector<std::thread> threads;
  {
    const std::lock_guard hold(all_started);  // all of them must exist at once
    try {
      threads.reserve(static_cast<std::size_t>(count));
      while (static_cast<int>(threads.size()) < count)
        threads.emplace_back([&all_started] { const std::lock_guard wait(all_started); });
    } catch (const std::exception&) {
      // No more threads, or no memory for them.
    }
  }
  for (std::thread& thread : threads) thread.join();
  return static_cast<int>(threads.size());
}

// libgomp terminates the process if it cannot start a thread, so we first test how many can be started. libgomp keeps
// the threads of the calling thread's last team, so only a larger team needs new threads. Between the test and the
// region, other processes of the same user may still use up these threads.
int granted_threads(int wanted, std::unique_lock<std::mutex>& growing) {
  thread_local int team = 1;
  if (wanted > team) {
    growing = std::unique_lock(growth);
    wanted = team + startable_threads(wanted - team);
  }
  return team = wanted;
}

// In a shared runtime, the team keeps its size, and threads that are not needed return at once: libgomp terminates the
// threads that a smaller team leaves out, and the library that owns the runtime would have to start them again.
void run_openmp(const Region& region, int num_threads) {
  Team team{.region = region, .num_threads = num_threads};
  const Runtime* runtime = shared.load(std::memory_order_acquire);
  const int size = granted_threads(runtime ? std::max(num_threads, runtime->threads()) : num_threads, team.growing);
  if (runtime) return runtime->run(&join, &team, static_cast<unsigned>(size), 0);
#pragma omp parallel num_threads(size) default(shared)
  join(&team);
  // Some schedulers wake a thread of the team on the caller's CPU, in one region after another. The thread then does
  // not run until the caller waits for it. make_way() needs a thread that still exists: the threads of our own teams
  // exist until the next region.
  team.last.make_way();
}
#endif

void run_here(const Region& region, int num_threads) {
  if (num_threads <= 1 || backend() == Backend::serial) return region.work(region.context, caller_thread);
#if defined(SELFATTN_OPENMP)
  if (backend() == Backend::openmp) return run_openmp(region, num_threads);
#endif
  run_threads(region, num_threads);
}

thread_local bool survived_fork = false;  // this thread called fork and goes on in the child process
ForkHelper* helper = nullptr;             // never deleted: its thread runs until the process ends

// Null if there is no memory for a helper, or its thread cannot be started.
ForkHelper* start_helper() {
  try {
    if (!helper) helper = new ForkHelper(run_here);
  } catch (const std::exception&) {
    return nullptr;
  }
  return helper;
}

// Whether a region of this thread runs on a helper thread while this thread waits and polls.
bool runs_on_helper(int num_threads) { return num_threads > 1 && survived_fork && backend() == Backend::openmp; }

// Threads of this process that are in regions, callers included.
std::atomic<int> threads_in_regions{0};

[[maybe_unused]] void after_fork_in_child() {
  survived_fork = true;
  threads_in_regions = 0;
  new (&growth) std::mutex;  // another thread of the parent may have held it
  helper = nullptr;          // the parent's helper thread does not exist here
}

std::atomic<int> chosen_threads{0};

ThreadDefault detect_threads() {
  static const int quota = cgroup_cpus("");
  static const int hardware = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  ThreadDefault limit{hardware, "hardware"};
  const auto lower = [&](int count, const char* source) {
    if (count > 0 && count < limit.count) limit = {count, source};
  };
  lower(affinity_count(), "CPU affinity");
  lower(quota, "control group quota");
#if defined(SELFATTN_OPENMP)
  // OpenMP's setting for this thread: OMP_NUM_THREADS, omp_set_num_threads, threadpoolctl. It is compared last because
  // OpenMP's own default is the affinity: OpenMP is the source only if a smaller number was set.
  lower(omp_get_max_threads(), "OpenMP");
#endif
  return limit;
}

// The number of threads of a region. The region gets all that it wants if no other thread of this process is in a
// region. Otherwise it gets at most the default number minus the threads that are in regions, but at least one.
class Seats {
 public:
  explicit Seats(int wanted) : count_(wanted) {
    const int others = threads_in_regions.fetch_add(wanted, std::memory_order_relaxed);
    if (wanted == 1 || others == 0) return;
    count_ = std::clamp(default_threads().count - others, 1, wanted);
    threads_in_regions.fetch_sub(wanted - count_, std::memory_order_relaxed);
  }
  ~Seats() { threads_in_regions.fetch_sub(count_, std::memory_order_relaxed); }
  Seats(const Seats&) = delete;
  Seats& operator=(const Seats&) = delete;

  int count() const { return count_; }

 private:
  int count_;
};

}  // namespace

int run_region(const Region& region, int num_threads) {
  // A signal handler that runs while this thread polls may start another region. The new region runs on this thread
  // alone: the team, and the helper after a fork, are busy with the interrupted region.
  thread_local bool in_region = false;
  const auto run_alone = [&] {
    region.work(region.context, caller_thread);
    return 1;
  };
  if (in_region) return run_alone();
  const Seats seats(num_threads);
  num_threads = seats.count();
  in_region = true;
  if (!runs_on_helper(num_threads))
    run_here(region, num_threads);
  else if (ForkHelper* const own = start_helper())
    own->run(region, num_threads);
  else
    num_threads = run_alone();
  in_region = false;
  return num_threads;
}

ThreadDefault default_threads() {
  const int chosen = chosen_threads.load(std::memory_order_relaxed);
  return chosen > 0 ? ThreadDefault{chosen, "set_num_threads"} : detect_threads();
}

void set_default_threads(int count) { chosen_threads.store(count, std::memory_order_relaxed); }

void share_runtime([[maybe_unused]] Runtime runtime) {
#if defined(SELFATTN_OPENMP)
  // The previous Runtime is never deleted: another thread may be starting a region with it.
  shared.store(runtime.run && runtime.threads ? new Runtime(runtime) : nullptr, std::memory_order_release);
#endif
}

const char* parallel_backend() {
  switch (backend()) {
    case Backend::openmp:
#if defined(SELFATTN_OPENMP)
      if (shared.load(std::memory_order_relaxed)) return "shared openmp";
#endif
      return "openmp";
    case Backend::threads:
      return "threads";
    case Backend::serial:
      break;
  }
  return "serial";
}

void prepare_for_fork() {
#if defined(SELFATTN_HAS_FORK)
  pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif
}

}  // namespace selfattn
