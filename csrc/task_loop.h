// Threads claim tasks from a shared counter until none is left or the call is interrupted.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

#include "parallel.h"

namespace selfattn {

// Called on the calling thread about every 50 ms; true: stop.
using Interrupted = bool (*)();

// After a call, the calling thread's team stays awake for a moment, so that useful_threads uses it even for smaller
// amounts of work. After forget_last_call(), useful_threads answers as if no call had just ended.
void note_end_of_call();
void forget_last_call();

class TaskLoop {
 public:
  TaskLoop(std::int64_t tasks, int threads, Interrupted interrupted)
      : tasks_(tasks), threads_(threads), interrupted_(interrupted), caller_waits_(runs_on_helper(threads)) {}

  // Calls task(index, slot) for every index, slot < threads. Returns false if it was stopped before the end.
  template <class F>
  bool run(F& task) {
    struct Context {
      TaskLoop& loop;
      F& task;
    } context{*this, task};
    run_region({[](void* opaque, int slot) noexcept {
                  auto& [loop, body] = *static_cast<Context*>(opaque);
                  if (slot >= loop.threads_) return;  // the team is larger than requested
                  std::int64_t index;
                  while (!loop.should_stop(slot) && loop.claim(index)) body(index, slot);
                },
                [](void* opaque) noexcept { static_cast<Context*>(opaque)->loop.ask(); }, &context},
               threads_);
    return !stopped_.load(std::memory_order_relaxed);
  }

  // Long tasks check this between their steps.
  bool should_stop(int slot) noexcept {
    if (slot == caller_slot && !caller_waits_ && Clock::now() - last_asked_ > interval) {
      ask();
      last_asked_ = Clock::now();
    }
    return stopped_.load(std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds interval{50};

  bool claim(std::int64_t& index) noexcept {
    index = next_.fetch_add(1, std::memory_order_relaxed);
    return index < tasks_;
  }

  void ask() noexcept {
    if (interrupted_ && interrupted_()) stopped_.store(true, std::memory_order_relaxed);
  }

  const std::int64_t tasks_;
  const int threads_;
  const Interrupted interrupted_;
  const bool caller_waits_;  // tasks run on a helper thread: the waiting caller polls, and slot 0 must not
  std::atomic<std::int64_t> next_{0};
  std::atomic<bool> stopped_{false};
  Clock::time_point last_asked_ = Clock::now();
};

// Number of threads worth using for this much work, at most num_threads (0: the default). Finding the default takes
// system calls, so it is only done if more than one thread is worth using. Results never depend on this number.
int useful_threads(double flops, double bytes, std::int64_t tasks, int num_threads);

}  // namespace selfattn
