// Threads claim tasks from a shared counter until none is left or the call is interrupted.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "parallel.h"
#include "rehearsal.h"

namespace selfattn {

// Called on the calling thread about every 50 ms; true: stop.
using Interrupted = bool (*)();

// What a region is about to compute. The time that work takes is learned for each kernel: `kernel` is any address that
// identifies one kind of work.
struct Work {
  const char* name;  // of the kind of work, for people
  const void* kernel;
  double flops, bytes;
  std::int64_t tasks;
};

// Number of threads that are expected to finish this work soonest. num_threads is the limit that the caller chose: all
// these threads are used if each gets enough work. 0 means that the default number is the limit. In this case fewer
// threads are used if they are expected to be faster (docs/decisions/0013). Finding the default takes system calls, so
// it is only done if more than one thread is worth using. Results never depend on this number.
int useful_threads(const Work& work, int num_threads);

// Calls that follow one another immediately form a loop. A loop may wake a team that a single call would leave asleep.
void note_end_of_call();
// Ends a loop: the next call is not part of it.
void forget_last_call();

class TaskLoop {
 public:
  TaskLoop(const Work& work, int threads, Interrupted interrupted)
      : work_(work), threads_(threads), interrupted_(interrupted) {}

  // Calls task(index, thread) for every index, thread < threads. Returns false if it was stopped before the end.
  template <class F>
  bool run(F& task) {
    if (Rehearsal* rehearsal = Rehearsal::active()) {
      rehearsal->add(work_, threads_);
      return true;
    }
    struct Context {
      TaskLoop& loop;
      F& task;
    } context{*this, task};
    const Clock::time_point start = Clock::now();
    const int used = run_region({[](void* opaque, int thread) noexcept {
                                   auto& [loop, body] = *static_cast<Context*>(opaque);
                                   loop.take_tasks(body, thread);
                                 },
                                 [](void* opaque) noexcept { static_cast<Context*>(opaque)->loop.ask(); }, &context},
                                threads_);
    const bool finished = !stopped_.load(std::memory_order_relaxed);
    learn(start, used, finished);
    return finished;
  }

  // Long tasks check this between their steps.
  bool should_stop(int thread) noexcept {
    if (thread == caller_thread && polls_ && Clock::now() - last_asked_ > interval) {
      ask();
      last_asked_ = Clock::now();
    }
    return stopped_.load(std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds interval{50};

  // The caller's share of the tasks. The time of all tasks on one thread is estimated from it.
  struct Share {
    std::int64_t tasks = 0;
    Clock::duration time{};
  };

  template <class F>
  void take_tasks(F& task, int thread) noexcept {
    if (thread >= threads_) return;  // the team is larger than requested
    if (thread == caller_thread) polls_ = std::this_thread::get_id() == caller_;
    const Clock::time_point start = thread == caller_thread ? Clock::now() : Clock::time_point();
    std::int64_t index, taken = 0;
    for (; !should_stop(thread) && claim(index); ++taken) task(index, thread);
    if (thread == caller_thread) own_ = {taken, Clock::now() - start};
  }

  bool claim(std::int64_t& index) noexcept {
    index = next_.fetch_add(1, std::memory_order_relaxed);
    return index < work_.tasks;
  }

  void ask() noexcept {
    if (interrupted_ && interrupted_()) stopped_.store(true, std::memory_order_relaxed);
  }

  void learn(Clock::time_point start, int used, bool finished) const;

  const Work work_;
  const int threads_;
  const Interrupted interrupted_;
  const std::thread::id caller_ = std::this_thread::get_id();
  bool polls_ = false;  // thread 0 polls; false: its tasks run on a helper thread, so the caller polls
  std::atomic<std::int64_t> next_{0};
  std::atomic<bool> stopped_{false};
  Clock::time_point last_asked_ = Clock::now();
  Share own_;
};

}  // namespace selfattn
