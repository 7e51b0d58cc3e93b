// Runs parallel regions for the one thread that exists in a child process right after a fork.
#pragma once
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "parallel.h"

namespace selfattn {

// libgomp stores a thread's team in the thread's own data. In a child process only the forking thread exists, but its
// data still refers to its old team, so its next region would wait forever. The thread therefore passes its regions to
// a helper: a thread that is created in the child and has a team of its own. Threads that the child starts later need
// no helper.
class ForkHelper {
 public:
  using Run = void (*)(const Region& region, int num_threads);

  // `run` runs a region on the helper's thread.
  explicit ForkHelper(Run run) : run_(run) {
    std::thread([this] { serve(); }).detach();
  }

  void run(const Region& region, int num_threads) {
    std::unique_lock lock(mutex_);
    region_ = &region;
    num_threads_ = num_threads;
    changed_.notify_all();
    while (!changed_.wait_for(lock, std::chrono::milliseconds(50), [this] { return region_ == nullptr; })) {
      lock.unlock();
      region.poll(region.context);
      lock.lock();
    }
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return region_ != nullptr; });
      lock.unlock();
      run_(*region_, num_threads_);
      lock.lock();
      region_ = nullptr;
      changed_.notify_all();
    }
  }

  const Run run_;
  std::mutex mutex_;
  std::condition_variable changed_;
  const Region* region_ = nullptr;
  int num_threads_ = 0;
};

}  // namespace selfattn
