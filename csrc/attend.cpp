#include "attend.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

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

struct Part {
  const Problem* problem;
  const Plan* plan;
  ScoreTerms terms;
  Shared shared;
};

std::int64_t tasks_per_block(const Part& part) { return part.problem->num_kv_heads * part.plan->ranges; }

Work work_of(const Job* jobs, std::int64_t count) {
  Work work{count > 0 ? jobs->plan->attend : nullptr, 0, 0, 0};
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
      : count_(count), ordered_(count > 1 || threads > 1), thread_bytes_(0) {
    std::size_t bytes = whole_lines(sizeof(Part) * static_cast<std::size_t>(count));
    std::int64_t blocks = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const Plan& plan = *jobs[i].plan;
      bytes += plan.shared_bytes;
      thread_bytes_ = std::max(thread_bytes_, plan.thread_bytes);
      blocks += jobs[i].problem->batch * plan.row_blocks;
    }
    const std::size_t order_bytes = ordered_ ? whole_lines(sizeof(RowTasks) * static_cast<std::size_t>(blocks)) : 0;
    memory_.emplace(bytes + order_bytes + thread_bytes_ * static_cast<std::size_t>(threads));
    char* place = memory_->data();
    parts_ = reinterpret_cast<Part*>(place);
    place += whole_lines(sizeof(Part) * static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
      const Problem& problem = *jobs[i].problem;
      const Plan& plan = *jobs[i].plan;
      assert(problem.out || problem.value_dim == 0 || plan.tasks == 0);
      const Part* part = ::new (parts_ + i) Part{&problem, &plan, score_terms(problem), Shared(place, plan, problem)};
      std::uninitialized_value_construct_n(part->shared.finished, part->shared.row_blocks);
      place += plan.shared_bytes;
    }
    if (ordered_) order_tasks(reinterpret_cast<RowTasks*>(place));
    threads_memory_ = place + order_bytes;
    loop_.emplace(work_of(jobs, count), threads, interrupted);
  }

  bool execute() { return loop_->run(*this); }

  void operator()(std::int64_t index, int thread) noexcept {
    const Task task = task_at(index);
    const Part& part = parts_[task.job];
    char* own = threads_memory_ + thread_bytes_ * static_cast<std::size_t>(thread);
    attend_task(part, task, ThreadMemory(own, *part.plan, *part.problem), thread);
  }

 private:
  // Largest first, so that no thread is left alone with a long task at the end.
  void order_tasks(RowTasks* next) {
    order_ = next;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Problem& problem = *parts_[i].problem;
      for (std::int64_t block = 0; block < parts_[i].plan->row_blocks; ++block)
        for (std::int64_t b = 0; b < problem.batch; ++b) {
          const RowSpan span = span_of(problem, *parts_[i].plan, b, 0, block);
          const KeyRange keys = span_keys(problem, span);
          // Several problems may have different numbers of rows.
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
      tasks += tasks_per_block(parts_[rows->job]);
    }
  }

  Task task_at(std::int64_t index) const {
    if (!ordered_) {
      const Plan& plan = *parts_->plan;
      const std::int64_t per_block = tasks_per_block(*parts_), block = index / per_block;
      index %= per_block;
      return {0, block / plan.row_blocks, index / plan.ranges, block % plan.row_blocks, index % plan.ranges};
    }
    const RowTasks& rows =
        *(std::upper_bound(order_, end_, index,
                           [](std::int64_t task, const RowTasks& r) { return task < r.first_task; }) -
          1);
    const std::int64_t ranges = parts_[rows.job].plan->ranges;
    index -= rows.first_task;
    return {rows.job, rows.batch, index / ranges, rows.row_block, index % ranges};
  }

  void attend_task(const Part& part, const Task& task, const ThreadMemory& memory, int thread) noexcept {
    const Problem& problem = *part.problem;
    const Plan& plan = *part.plan;
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

    RowBlock block{memory.rows,
                   span.valid,
                   plan.key_block,
                   problem.head_dim,
                   problem.value_dim,
                   part.terms,
                   plan.out_type,
                   /*normalise=*/!split && !running,
                   running.begun,
                   memory.row_max,
                   memory.row_sum,
                   memory.kernel_scratch};
    if (running.begun) load_sums(problem, span, memory);
    if (split) redirect(problem, block, memory, part.shared.partial(plan, problem, block_index, task.range));
    plan.attend->begin(block);
    const KeyRange keys{task.range * ranges.keys, (task.range + 1) * ranges.keys};
    if (!absorb_keys(part, task, span, keys, block, memory, thread)) return;
    plan.attend->finish(block);
    if (running) return store_sums(problem, span, memory);
    if (!split) return complete_rows(problem, plan, span, memory, memory.row_max, memory.row_sum);

    const Partial result = part.shared.partial(plan, problem, block_index, task.range);
    const auto bytes = static_cast<std::size_t>(span.valid * size_of(problem.dtype));
    std::memcpy(result.row_max, memory.row_max, bytes);
    std::memcpy(result.row_sum, memory.row_sum, bytes);
    // The thread that finishes last merges. Acquire-release makes the other ranges' results visible to it.
    if (part.shared.finished[block_index].fetch_add(1, std::memory_order_acq_rel) + 1 == ranges.count)
      merge_ranges(problem, plan, part.shared, block_index, span, memory);
  }

  static void redirect(const Problem& problem, const RowBlock& block, const ThreadMemory& memory,
                       const Partial& result) {
    for (int i = 0; i < block.count; ++i)
      memory.rows[i].out = result.out + i * problem.value_dim * size_of(problem.dtype);
  }

  // Blocks start at multiples of key_block, so a row's result does not depend on which keys its neighbours see. The
  // first block of a piece may start later.
  bool absorb_keys(const Part& part, const Task& task, const RowSpan& span, const KeyRange& range,
                   const RowBlock& block, const ThreadMemory& memory, int thread) noexcept {
    const Problem& problem = *part.problem;
    const Plan& plan = *part.plan;
    const KeyRange keys = span_keys(problem, span);
    const std::int64_t begin = std::max(keys.begin, range.begin), end = std::min(keys.end, range.end);
    // An empty range would be rounded down to a block whose keys may be in no page.
    if (begin >= end) return true;
    const std::int64_t masked_from = problem.masked_from(task.batch);
    RowBlock unmasked = block;
    unmasked.terms.mask = false;
    const KeySource source(problem, plan, memory, task.batch, task.kv_head);
    std::optional<DistanceTerms> by_distance;
    if (problem.relative || problem.distance_bias)
      by_distance.emplace(problem, RelativeProducts{plan.kernels, plan.types, plan.copies_relative, plan.relative_keys},
                          span, memory.rows, memory.distance);
    const std::int64_t step = plan.key_block;
    for (std::int64_t first = std::max(begin / step * step, problem.held.begin), next; first < end; first = next) {
      if (loop_->should_stop(thread)) return false;
      next = std::min((first / step + 1) * step, end);
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
  std::size_t thread_bytes_;
  std::optional<Scratch> memory_;
  Part* parts_ = nullptr;
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
  return Run(jobs, count, threads, interrupted).execute();
}

}  // namespace selfattn
