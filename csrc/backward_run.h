// One team of threads for the backward passes of several problems.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "backward.h"
#include "scratch_pool.h"
#include "task_loop.h"

namespace selfattn {

// Puts the tasks of all problems into one order: first all row tasks, then all range tasks. The tasks of a problem keep
// their order, so that a task only waits for tasks that were started before it. The class `Pass` computes the backward
// pass of one problem. It has the constructor Pass(job, shared_memory, loop) and the functions prepare_rows(task,
// own_memory) and visit_range(task, own_memory, thread).
template <class Pass>
class BackwardRun {
 public:
  BackwardRun(const BackwardJob* jobs, std::int64_t count, int threads, Interrupted interrupted)
      : sizes_(jobs, count),
        shared_(sizes_.shared_bytes),
        own_(sizes_.thread_bytes, threads),
        loop_(work_of(jobs, count), threads, interrupted) {
    // Problems with long tasks first, so that no thread is left alone with such a task at the end.
    std::vector<BackwardJob> ordered(jobs, jobs + count);
    std::sort(ordered.begin(), ordered.end(),
              [](const BackwardJob& a, const BackwardJob& b) { return task_cost(a) > task_cost(b); });
    entries_.reserve(ordered.size());
    char* shared = shared_.data();
    std::int64_t rows = 0, ranges = 0;
    for (const BackwardJob& job : ordered) {
      entries_.push_back({Pass(job, shared, loop_), rows, ranges});
      shared += job.plan->shared_bytes;
      rows += job.plan->row_tasks;
      ranges += job.plan->tasks - job.plan->row_tasks;
    }
  }

  bool execute() { return loop_.run(*this); }

  void operator()(std::int64_t index, int thread) noexcept {
    char* own = own_.of(thread);
    if (index < sizes_.row_tasks) {
      Entry& entry = entry_of(index, &Entry::first_rows);
      entry.pass.prepare_rows(index - entry.first_rows, own);
    } else {
      index -= sizes_.row_tasks;
      Entry& entry = entry_of(index, &Entry::first_range);
      entry.pass.visit_range(index - entry.first_range, own, thread);
    }
  }

 private:
  struct Entry {
    Pass pass;
    std::int64_t first_rows, first_range;  // indices of its first row task and its first range task
  };

  struct Sizes {
    std::int64_t row_tasks = 0, range_tasks = 0;
    std::size_t shared_bytes = 0, thread_bytes = 0;

    Sizes(const BackwardJob* jobs, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) {
        const BackwardPlan& plan = *jobs[i].plan;
        row_tasks += plan.row_tasks;
        range_tasks += plan.tasks - plan.row_tasks;
        shared_bytes += plan.shared_bytes;
        thread_bytes = std::max(thread_bytes, plan.thread_bytes);
      }
    }
  };

  static std::int64_t task_cost(const BackwardJob& job) {
    return job.problem->q_len * std::min<std::int64_t>(job.problem->kv_len, job.plan->range_keys);
  }

  // The entry to which a task belongs: the last entry that starts at or before the task. An entry without tasks starts
  // where the next entry starts, so it is never found.
  Entry& entry_of(std::int64_t task, std::int64_t Entry::* first) {
    return *(std::upper_bound(entries_.begin(), entries_.end(), task,
                              [first](std::int64_t index, const Entry& entry) { return index < entry.*first; }) -
             1);
  }

  const Sizes sizes_;
  const Scratch shared_;
  const ThreadScratch own_;
  TaskLoop loop_;
  std::vector<Entry> entries_;
};

}  // namespace selfattn
