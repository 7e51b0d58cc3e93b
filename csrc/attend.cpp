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
  std::int64_t job, batch, kv_head, row_block, range;
};

// The tasks of one block of query rows of a batch entry: one for each KV head and each range of keys.
struct RowTasks {
  std::int64_t job, batch, row_block;
  std::int64_t cost;
  std::int64_t first_task;
};

struct PreparedJob {
  const Problem* problem;
  const Plan* plan;
  Scoring scoring;
  Shared shared;
};

std::int64_t tasks_per_block(const PreparedJob& job) { return job.problem->num_kv_heads * job.plan->ranges; }

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
    std::int64_t blocks = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const Plan& plan = *jobs[i].plan;
      shared_bytes += plan.shared_bytes;
      thread_bytes_ = std::max(thread_bytes_, plan.thread_bytes);
      blocks += jobs[i].problem->batch * plan.row_blocks;
    }
    char* shared = nullptr;
    const auto divide = [&](char* base) {
      Carver carver{base};
      jobs_ = carver.take<PreparedJob>(count);
      shared = carver.take<char>(static_cast<std::int64_t>(shared_bytes));
      order_ = carver.take<RowTasks>(ordered_ ? blocks : 0);
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
    attend_task(job, task, ThreadMemory(own, *job.plan, *job.problem), thread);
  }

 private:
  // Largest first, so that no thread is left alone with a long task at the end.
  void order_tasks() {
    RowTasks* next = order_;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Problem& problem = *jobs_[i].problem;
      for (std::int64_t block = 0; block < jobs_[i].plan->row_blocks; ++block)
        for (std::int64_t b = 0; b < problem.batch; ++b) {
          const RowSpan span = span_of(problem, *jobs_[i].plan, b, 0, block);
          const KeyRange keys = span_keys(problem, span);
          // Nearly all blocks of one problem have equally many rows, so that the number of keys suffices as the cost.
          // Blocks of different problems may have different numbers of rows.
          const std::int64_t rows = count_ > 1 ? span.valid : 1;
          *next++ = {i, b, block, (keys.end - keys.begin) * rows, 0};
        }
    }
    end_ = next;
    std::sort(order_, end_, [](const RowTasks& a, const RowTasks& b) {
      return std::tie(b.cost, b.row_block, a.job, a.batch) < std::tie(a.cost, a.row_block, b.job, b.batch);
    });
    std::int64_t tasks = 0;
    for (RowTasks* rows = order_; rows != end_; ++rows) {
      rows->first_task = tasks;
      tasks += tasks_per_block(jobs_[rows->job]);
    }
  }

  Task task_at(std::int64_t index) const {
    if (!ordered_) {
      const Plan& plan = *jobs_->plan;
      const std::int64_t per_block = tasks_per_block(*jobs_), block = index / per_block;
      index %= per_block;
      return {0, block / plan.row_blocks, index / plan.ranges, block % plan.row_blocks, index % plan.ranges};
    }
    const RowTasks& rows =
        *(std::upper_bound(order_, end_, index,
                           [](std::int64_t task, const RowTasks& r) { return task < r.first_task; }) -
          1);
    const std::int64_t ranges = jobs_[rows.job].plan->ranges;
    index -= rows.first_task;
    return {rows.job, rows.batch, index / ranges, rows.row_block, index % ranges};
  }

  void attend_task(const PreparedJob& job, const Task& task, const ThreadMemory& memory, int thread) noexcept {
    const Problem& problem = *job.problem;
    const Plan& plan = *job.plan;
    const RowSpan span = span_of(problem, plan, task.batch, task.kv_head, task.row_block);
    if (task.range == 0) clear_rows(problem, span);
    const Ranges ranges = ranges_of(plan, problem.keys_of(task.batch));
    if (span.valid == 0 || task.range >= ranges.count) return;
    const bool split = ranges.count > 1;
    const RunningSums& running = problem.running;
    if (running.begun && is_empty(span_keys(problem, span))) return;
    const std::int64_t block_index =
        (task.batch * problem.num_kv_heads + task.kv_head) * plan.row_blocks + task.row_block;
    describe_rows(problem, plan, span, memory, /*with_sinks=*/problem.sinks && !split);

    RowBlock block{memory.rows,       span.valid,     plan.key_block, problem.head_dim,
                   problem.value_dim, job.scoring,    plan.out_type,  /*normalise=*/!split && !running,
                   running.begun,     memory.row_max, memory.row_sum, memory.kernel_scratch};
    if (running.begun) load_sums(problem, span, memory);
    if (split) redirect(problem, block, memory, job.shared.partial(plan, problem, block_index, task.range));
    plan.attend->begin(block);
    const KeyRange keys{task.range * ranges.keys, (task.range + 1) * ranges.keys};
    if (!absorb_keys(job, span, keys, block, memory, thread)) return;
    plan.attend->finish(block);
    if (running) return store_sums(problem, span, memory);
    if (!split) return complete_rows(problem, plan, span, memory, memory.row_max, memory.row_sum);

    const Partial result = job.shared.partial(plan, problem, block_index, task.range);
    const auto bytes = static_cast<std::size_t>(span.valid * size_of(problem.dtype));
    std::memcpy(result.row_max, memory.row_max, bytes);
    std::memcpy(result.row_sum, memory.row_sum, bytes);
    // The thread that finishes last merges. Acquire-release makes the other ranges' results visible to it.
    if (job.shared.finished[block_index].fetch_add(1, std::memory_order_acq_rel) + 1 == ranges.count)
      merge_ranges(problem, plan, job.shared, block_index, span, memory);
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
  return plan.tasks == 0 || (problem.value_dim == 0 && !problem.lse && !problem.weights && !problem.running);
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
