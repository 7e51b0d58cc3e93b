#include "attend.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "carver.h"
#include "distance_terms.h"
#include "key_source.h"
#include "row_block.h"
#include "scratch_pool.h"
#include "task_loop.h"
#include "thread_memory.h"

namespace selfattn {
namespace {

struct Task {
  std::int64_t job, batch, kv_head, row_task, range;
};

// The tasks of one row task (Plan::row_tasks) of a batch entry: one for each KV head and each range of keys.
struct RowTasks {
  std::int64_t job, batch, row_task;
  std::int64_t cost;
  std::int64_t first_task;
};

struct PreparedJob {
  const Problem* problem;
  const Plan* plan;
  Scoring scoring;
  Shared shared;
};

std::int64_t tasks_per_row_task(const PreparedJob& job) { return job.problem->num_kv_heads * job.plan->ranges; }

Work work_of(const Job* jobs, std::int64_t count) {
  Work work{"attention", count > 0 ? jobs->plan->attend : nullptr, 0, 0, 0};
  for (std::int64_t i = 0; i < count; ++i) {
    work.flops += jobs[i].plan->flops;
    work.bytes += jobs[i].plan->bytes;
    work.tasks += jobs[i].plan->tasks;
  }
  return work;
}

class Run {
 public:
  Run(const Job* jobs, std::int64_t count, int threads, Interrupted interrupted)
      : count_(count), ordered_(count > 1 || threads > 1) {
    std::size_t shared_bytes = 0;
    std::int64_t row_tasks = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const Plan& plan = *jobs[i].plan;
      shared_bytes += plan.shared_bytes;
      thread_bytes_ = std::max(thread_bytes_, plan.thread_bytes);
      row_tasks += jobs[i].problem->batch * plan.row_tasks;
    }
    char* shared = nullptr;
    const auto divide = [&](char* base) {
      Carver carver{base};
      jobs_ = carver.take<PreparedJob>(count);
      shared = carver.take<char>(static_cast<std::int64_t>(shared_bytes));
      order_ = carver.take<RowTasks>(ordered_ ? row_tasks : 0);
      threads_memory_ = carver.take<char>(static_cast<std::int64_t>(thread_bytes_) * threads);
      return carver.used;
    };
    memory_.emplace(divide(nullptr));
    divide(memory_->data());
    for (std::int64_t i = 0; i < count; ++i) {
      const Problem& problem = *jobs[i].problem;
      const Plan& plan = *jobs[i].plan;
      assert(problem.out || problem.value_dim == 0 || plan.tasks == 0);
      const PreparedJob* job =
          ::new (jobs_ + i) PreparedJob{&problem, &plan, scoring_of(problem), Shared(shared, plan, problem)};
      std::uninitialized_value_construct_n(job->shared.finished, job->shared.row_blocks);
      std::uninitialized_value_construct_n(job->shared.mass.finished, job->shared.mass.kv_heads);
      shared += plan.shared_bytes;
    }
    if (ordered_) order_tasks();
    loop_.emplace(work_of(jobs, count), threads, interrupted);
  }

  bool execute() { return loop_->run(*this); }

  void operator()(std::int64_t index, int thread) noexcept {
    const Task task = task_at(index);
    const PreparedJob& job = jobs_[task.job];
    char* own = threads_memory_ + thread_bytes_ * static_cast<std::size_t>(thread);
    ThreadMemory memory(own, *job.plan, *job.problem);
    bool completed = false;
    for (std::int64_t block = task.row_task; block < job.plan->row_blocks; block += job.plan->row_tasks) {
      completed = attend_block(job, task, block, memory, thread);
      if (loop_->should_stop(thread)) return;
    }
    if (job.problem->key_mass && completed) job.shared.mass.finish(*job.plan, *job.problem, kv_index(job, task));
  }

 private:
  // Largest first, so that no thread is left alone with a long task at the end.
  void order_tasks() {
    RowTasks* next = order_;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Problem& problem = *jobs_[i].problem;
      for (std::int64_t row_task = 0; row_task < jobs_[i].plan->row_tasks; ++row_task)
        for (std::int64_t b = 0; b < problem.batch; ++b) *next++ = {i, b, row_task, cost_of(jobs_[i], b, row_task), 0};
    }
    end_ = next;
    std::sort(order_, end_, [](const RowTasks& a, const RowTasks& b) {
      return std::tie(b.cost, b.row_task, a.job, a.batch) < std::tie(a.cost, a.row_task, b.job, b.batch);
    });
    std::int64_t tasks = 0;
    for (RowTasks* rows = order_; rows != end_; ++rows) {
      rows->first_task = tasks;
      tasks += tasks_per_row_task(jobs_[rows->job]);
    }
  }

  std::int64_t cost_of(const PreparedJob& job, std::int64_t batch, std::int64_t row_task) const {
    std::int64_t cost = 0;
    for (std::int64_t block = row_task; block < job.plan->row_blocks; block += job.plan->row_tasks) {
      const RowSpan span = span_of(*job.problem, *job.plan, batch, 0, block);
      const KeyRange keys = span_keys(*job.problem, span);
      // Nearly all blocks of one problem have equally many rows, so that the number of keys suffices as the cost.
      // Blocks of different problems may have different numbers of rows.
      cost += (keys.end - keys.begin) * (count_ > 1 ? span.valid : 1);
    }
    return cost;
  }

  Task task_at(std::int64_t index) const {
    if (!ordered_) {
      const Plan& plan = *jobs_->plan;
      const std::int64_t each = tasks_per_row_task(*jobs_), row_task = index / each;
      index %= each;
      return {0, row_task / plan.row_tasks, index / plan.ranges, row_task % plan.row_tasks, index % plan.ranges};
    }
    const RowTasks& rows =
        *(std::upper_bound(order_, end_, index,
                           [](std::int64_t task, const RowTasks& r) { return task < r.first_task; }) -
          1);
    const std::int64_t ranges = jobs_[rows.job].plan->ranges;
    index -= rows.first_task;
    return {rows.job, rows.batch, index / ranges, rows.row_task, index % ranges};
  }

  static std::int64_t kv_index(const PreparedJob& job, const Task& task) {
    return task.batch * job.problem->num_kv_heads + task.kv_head;
  }

  static double* mass_of(const PreparedJob& job, const Task& task, std::int64_t row_block) {
    if (!job.problem->key_mass) return nullptr;
    return job.shared.mass.of(*job.plan, *job.problem, kv_index(job, task), row_block);
  }

  // Returns whether the results of the row block are complete now.
  bool attend_block(const PreparedJob& job, const Task& task, std::int64_t row_block, ThreadMemory& memory,
                    int thread) noexcept {
    const Problem& problem = *job.problem;
    const Plan& plan = *job.plan;
    const RowSpan span = span_of(problem, plan, task.batch, task.kv_head, row_block);
    if (task.range == 0) clear_rows(problem, span);
    const Ranges ranges = ranges_of(plan, problem.keys_of(task.batch));
    if (task.range >= ranges.count) return false;
    if (span.valid == 0) {
      if (task.range == 0) memory.mass = mass_of(job, task, row_block);
      return task.range == 0;
    }
    const bool split = ranges.count > 1;
    const RunningSums& running = problem.running;
    if (running.begun && is_empty(span_keys(problem, span))) return true;
    const std::int64_t block_index = kv_index(job, task) * plan.row_blocks + row_block;
    // The ranges of a row block store their scores in the same rows.
    if (plan.keeps_scores && plan.ranges > 1) memory.scores = job.shared.scores_of(plan, problem, block_index);
    describe_rows(problem, plan, span, memory, /*with_sinks=*/problem.sinks && !split);

    RowBlock block{memory.rows,       span.valid,     plan.key_block, problem.head_dim,
                   problem.value_dim, job.scoring,    plan.out_type,  /*normalise=*/!split && !running,
                   running.begun,     memory.row_max, memory.row_sum, memory.kernel_scratch};
    if (running.begun) load_sums(problem, span, memory);
    if (split) redirect(problem, block, memory, job.shared.partial(plan, problem, block_index, task.range));
    plan.attend->begin(block);
    const KeyRange keys{task.range * ranges.keys, (task.range + 1) * ranges.keys};
    if (!absorb_keys(job, span, keys, block, memory, thread)) return false;
    plan.attend->finish(block);
    if (running) {
      store_sums(problem, span, memory);
      return true;
    }
    if (split && !finishes_last(job, span, memory, block_index, task.range)) return false;
    memory.mass = mass_of(job, task, row_block);
    if (split)
      merge_ranges(problem, plan, job.shared, block_index, span, memory);
    else
      complete_rows(problem, plan, span, memory, memory.row_max, memory.row_sum);
    return true;
  }

  // Keeps the results of a key range. Returns whether the row block's other ranges have finished before.
  static bool finishes_last(const PreparedJob& job, const RowSpan& span, const ThreadMemory& memory,
                            std::int64_t block_index, std::int64_t range) {
    const Problem& problem = *job.problem;
    const Partial result = job.shared.partial(*job.plan, problem, block_index, range);
    const auto bytes = static_cast<std::size_t>(span.valid * size_of(problem.dtype));
    std::memcpy(result.row_max, memory.row_max, bytes);
    std::memcpy(result.row_sum, memory.row_sum, bytes);
    // Acquire-release makes the other ranges' results visible to the thread that finishes last, which merges them.
    const std::int64_t count = ranges_of(*job.plan, problem.keys_of(span.batch)).count;
    return job.shared.finished[block_index].fetch_add(1, std::memory_order_acq_rel) + 1 == count;
  }

  static void redirect(const Problem& problem, const RowBlock& block, const ThreadMemory& memory,
                       const Partial& result) {
    for (int i = 0; i < block.count; ++i)
      memory.rows[i].out = result.out + i * problem.value_dim * size_of(problem.dtype);
  }

  // Blocks start at multiples of key_block, so a row's result does not depend on the keys that other rows of the span
  // see. The first block of a piece may start later.
  bool absorb_keys(const PreparedJob& job, const RowSpan& span, const KeyRange& range, const RowBlock& block,
                   const ThreadMemory& memory, int thread) noexcept {
    const Problem& problem = *job.problem;
    const Plan& plan = *job.plan;
    const KeyRange keys = span_keys(problem, span);
    const std::int64_t begin = std::max(keys.begin, range.begin), end = std::min(keys.end, range.end);
    // The loop below rounds `begin` down to a multiple of key_block. So it would visit a block even if there is no key
    // to visit, and the keys of that block may be in no page.
    if (begin >= end) return true;
    const std::int64_t masked_from = problem.masked_from(span.batch);
    RowBlock unmasked = block;
    unmasked.scoring.mask = false;
    const KeySource source(problem, plan, memory, span.batch, span.kv_head(problem));
    std::optional<DistanceTerms> by_distance;
    if (problem.relative || problem.distance_bias)
      by_distance.emplace(problem, RelativeProducts{plan.kernels, plan.types, plan.copies_relative, plan.relative_keys},
                          span, memory.rows, memory.distance);
    const std::int64_t size = plan.key_block;
    for (std::int64_t first = std::max(begin / size * size, problem.held.begin), next; first < end; first = next) {
      if (loop_->should_stop(thread)) return false;
      next = std::min((first / size + 1) * size, end);
      const int count = static_cast<int>(next - first);
      const bool masked = !problem.recent_mask || first + count > masked_from;
      if (problem.recent_mask && problem.mask && masked) spread_masks(problem, span, memory, first, count);
      if (by_distance) by_distance->prepare(first, count, end);
      plan.attend->absorb(masked ? block : unmasked, source.block(first, count));
    }
    return true;
  }

  const std::int64_t count_;
  const bool ordered_;
  std::size_t thread_bytes_ = 0;
  std::optional<Scratch> memory_;
  PreparedJob* jobs_ = nullptr;
  RowTasks *order_ = nullptr, *end_ = nullptr;
  char* threads_memory_ = nullptr;
  std::optional<TaskLoop> loop_;
};

bool writes_nothing(const Problem& problem, const Plan& plan) {
  return plan.tasks == 0 ||
         (problem.value_dim == 0 && !problem.lse && !problem.weights && !problem.key_mass && !problem.running);
}

}  // namespace

int threads_for(const Plan& plan, int num_threads) {
  const Job job{nullptr, &plan};
  return threads_for(&job, 1, num_threads);
}

int threads_for(const Job* jobs, std::int64_t count, int num_threads) {
  return useful_threads(work_of(jobs, count), num_threads);
}

bool attend(const Problem& problem, const Plan& plan, int threads, Interrupted interrupted) {
  const Job job{&problem, &plan};
  return attend(&job, 1, threads, interrupted);
}

bool attend(const Job* jobs, std::int64_t count, int threads, Interrupted interrupted) {
  bool nothing = true;
  for (std::int64_t i = 0; i < count; ++i) nothing = nothing && writes_nothing(*jobs[i].problem, *jobs[i].plan);
  if (nothing) return true;
  if (Rehearsal* rehearsal = Rehearsal::active()) {
    for (std::int64_t i = 0; i < count; ++i) rehearsal->add(*jobs[i].plan, threads);
    return true;
  }
  return Run(jobs, count, threads, interrupted).execute();
}

}  // namespace selfattn
