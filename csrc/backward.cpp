#include "backward.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "backward_memory.h"
#include "backward_prepare.h"
#include "backward_relative.h"
#include "backward_rows.h"
#include "backward_run.h"
#include "backward_sums.h"

namespace selfattn {
namespace {

// The backward pass of one problem.
template <class T>
class BackwardPart {
 public:
  BackwardPart(const BackwardJob& job, char* shared_memory, TaskLoop& loop)
      : problem_(*job.problem),
        gradients_(*job.gradients),
        plan_(*job.plan),
        scoring_(scoring_of(problem_)),
        sums_(problem_, gradients_, plan_),
        relative_(problem_, gradients_, plan_),
        shared_(shared_memory, plan_, problem_),
        prepared_(problem_, gradients_, plan_, shared_),
        loop_(loop) {
    // The rows of a block belong to one head, so that they share one line of biases by distance.
    scoring_.toeplitz = problem_.distance_bias && !problem_.bias && !problem_.mask;
    std::uninitialized_value_construct_n(shared_.rows_prepared, plan_.row_tasks);
    std::uninitialized_value_construct_n(shared_.progress, plan_.tasks - plan_.row_tasks);
  }

  void prepare_rows(std::int64_t index, char* own_memory) noexcept {
    const std::int64_t block = index % plan_.row_blocks, head = index / plan_.row_blocks % problem_.num_heads;
    const BackwardThreadMemory memory(own_memory, plan_, problem_, gradients_);
    prepared_.prepare(span_of(index / plan_.row_blocks / problem_.num_heads, head, block), memory);
    shared_.rows_prepared[index].store(1, std::memory_order_release);
  }

  void visit_range(std::int64_t index, char* own_memory, int thread) noexcept {
    const BackwardThreadMemory memory(own_memory, plan_, problem_, gradients_);
    // The tasks of all heads for the first range of keys come first, then those for the next range. So when a task
    // needs the results of the preceding range, the task that computes them was started long before.
    const std::int64_t heads = problem_.batch * problem_.num_kv_heads;
    BackwardTask task{index, index / heads, index % heads / problem_.num_kv_heads, index % problem_.num_kv_heads,
                      thread};
    task.first = task.range * plan_.range_keys;
    task.count = static_cast<int>(std::min<std::int64_t>(problem_.kv_len - task.first, plan_.range_keys));
    visit_rows(task, memory);
  }

 private:
  RowSpan span_of(std::int64_t batch, std::int64_t head, std::int64_t block) const {
    return make_span(problem_, batch, head, 1, block * plan_.block_rows, plan_.block_rows);
  }

  // Waits until `task` has finished or skipped the block of rows. Returns false if the call was interrupted. `task` was
  // started before the calling thread's own task. Tasks wait only for tasks that were started before them, so there is
  // no deadlock.
  bool wait_for(std::int64_t task, std::int64_t block, int thread) noexcept {
    return wait_until(shared_.progress[task], block + 1, thread);
  }

  template <class Count>
  bool wait_until(const std::atomic<Count>& done, std::int64_t least, int thread) noexcept {
    for (int spins = 0; done.load(std::memory_order_acquire) < least; ++spins) {
      if (spins < 200) continue;
      if (loop_.should_stop(thread)) return false;
      std::this_thread::yield();
    }
    return true;
  }

  void visit_rows(BackwardTask& task, BackwardThreadMemory memory) noexcept {
    load_keys(task, memory);
    const std::int64_t blocks = problem_.group_size * plan_.row_blocks;
    const std::int64_t heads = problem_.batch * problem_.num_kv_heads;
    for (std::int64_t block = 0; block < blocks; ++block) {
      if (loop_.should_stop(task.thread)) return;
      const std::int64_t head = task.kv_head * problem_.group_size + block / plan_.row_blocks;
      const RowSpan span = span_of(task.batch, head, block % plan_.row_blocks);
      const KeyRange seen = span_keys(problem_, span);
      if (seen.begin < task.first + task.count && task.first < seen.end && seen.begin < seen.end)
        if (!visit(task, span, seen, block, memory)) return;
      if (gradients_.of_heads() && !deliver(task, span, block, memory)) return;
      // If heads share gradients of scores, the next task waits only for this task, not for the preceding task. So this
      // task must wait for the preceding task, even if this task skipped the block.
      if (gradients_.shares_scores && task.index % heads > 0 &&
          !wait_for(task.index - 1, blocks_before(block), task.thread))
        return;
      shared_.progress[task.index].store(block + 1, std::memory_order_release);
    }
    store_keys(task, memory);
  }

  // Before the task of a KV head adds `block` to shared gradients, the task of the preceding KV head must have finished
  // the block that this function returns: the same rows of that KV head's last query head.
  std::int64_t blocks_before(std::int64_t block) const {
    return (problem_.group_size - 1) * plan_.row_blocks + block % plan_.row_blocks;
  }

  void load_keys(BackwardTask& task, BackwardThreadMemory& memory) const {
    const auto source = [&](const Operand& operand) {
      const char* rows = problem_.at(operand, task.batch) + task.kv_head * operand.head + task.first * operand.row;
      return SourceRows{{rows, operand.row, operand.column}, operand.dtype};
    };
    memory.operands.keys = gather(*plan_.kernels, source(problem_.key), task.count, plan_.keys, memory.keys);
    memory.operands.values = gather(*plan_.kernels, source(problem_.value), task.count, plan_.values, memory.values);
    if (gradients_.distance_bias) std::fill_n(memory.distance_sums, problem_.distance_bias.count, 0.0);
    relative_.start(memory);
    clear(memory.dkeys, task.count * plan_.key_stride);
    clear(memory.dvalues, task.count * plan_.value_stride);
    task.finite = plan_.kernel->finite(memory.operands.keys, task.count * plan_.keys.stride) &&
                  plan_.kernel->finite(memory.operands.values, task.count * plan_.values.stride);
  }

  void store_keys(const BackwardTask& task, const BackwardThreadMemory& memory) const {
    const auto store = [&](const Operand& operand, char* rows, std::int64_t width, std::int64_t stride, double factor) {
      if (!operand) return;
      char* to = problem_.at(operand, task.batch) + task.kv_head * operand.head + task.first * operand.row;
      for (int i = 0; i < task.count; ++i, to += operand.row, rows += stride * size) {
        if (factor != 1) scale_row(rows, type_of<T>, width, factor);
        scatter_row(*plan_.kernels, {to, operand.column, operand.dtype}, rows, type_of<T>, width);
      }
    };
    store(gradients_.key, memory.dkeys, problem_.head_dim, plan_.key_stride, problem_.scale);
    store(gradients_.value, memory.dvalues, problem_.value_dim, plan_.value_stride, 1);
  }

  // Adds the sums over rows to the gradients of the head, after the task of the preceding range has done so. With
  // relative products, this task waits for the task of the preceding range after every block, even a skipped one. The
  // task of the next range waits only for this task, and so relies on this.
  bool deliver(BackwardTask& task, const RowSpan& span, std::int64_t block,
               const BackwardThreadMemory& memory) noexcept {
    const bool last_of_head = block % plan_.row_blocks == plan_.row_blocks - 1;
    if (!last_of_head && !problem_.relative) return true;
    if (task.range > 0 && !wait_for(task.index - problem_.batch * problem_.num_kv_heads, block, task.thread))
      return false;
    if (problem_.relative) relative_.deliver(task, span, last_of_head, memory);
    if (gradients_.distance_bias && last_of_head) sums_.deliver_distances(span, memory);
    return true;
  }

  bool visit(BackwardTask& task, const RowSpan& span, const KeyRange& seen, std::int64_t block,
             BackwardThreadMemory memory) noexcept {
    describe_rows(problem_, span, memory.rows);
    if (problem_.distance_bias || problem_.relative)
      DistanceTerms(problem_, plan_.relative, span, memory.rows, memory.distance)
          .prepare(task.first, task.count, task.first + task.count);
    memory.operands.queries = gather_queries<T>(problem_, plan_, span, problem_.key_bias, memory.queries);
    memory.operands.dout =
        gather(*plan_.kernels, rows_of(problem_, gradients_.dout, span), span.valid, plan_.values, memory.dout);
    const std::int64_t row_task =
        (span.batch * problem_.num_heads + span.first_head) * plan_.row_blocks + block % plan_.row_blocks;
    if (!wait_until(shared_.rows_prepared[row_task], 1, task.thread)) return false;
    if (memory.dscores) clear(memory.dscores, span.valid * plan_.score_stride);
    if (memory.relative.dproducts) clear(memory.relative.dproducts, plan_.block_rows + span.valid * plan_.score_stride);
    plan_.kernel->run(block_of(task, span, memory));
    relative_.visit(task, span, memory);

    const bool first = seen.begin / plan_.range_keys == task.range;
    const bool last = (seen.end - 1) / plan_.range_keys == task.range;
    const std::int64_t heads = problem_.batch * problem_.num_kv_heads;
    if (gradients_.shares_scores && task.index % heads > 0 &&
        !wait_for(task.index - 1, blocks_before(block), task.thread))
      return false;
    sums_.add_scores(task, span, memory);
    if (!first && !wait_for(task.index - heads, block, task.thread)) return false;
    sums_.add_rows(task, span, memory);
    if (gradients_.query) add_dquery(span, memory, first, last);
    return true;
  }

  BackwardBlock block_of(const BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const {
    const std::int64_t row = padded_row_index(problem_, plan_, span) * size;
    const bool keeps = gradients_.keeps_scores();
    const bool finite = task.finite && plan_.kernel->finite(memory.operands.queries, span.valid * plan_.keys.stride) &&
                        plan_.kernel->finite(memory.operands.dout, span.valid * plan_.values.stride);
    return {
        .rows = memory.rows,
        .count = span.valid,
        .scoring = scoring_,
        .head_dim = problem_.head_dim,
        .value_dim = problem_.value_dim,
        .queries = memory.operands.queries,
        .dout = memory.operands.dout,
        .shift = shared_.shift + row,
        .factor = shared_.factor + row,
        .delta = shared_.delta + row,
        .dquery = gradients_.through_keys() ? memory.dquery : nullptr,
        .first_key = task.first,
        .key_count = task.count,
        .key_block = plan_.key_block,
        .keys = memory.operands.keys,
        .values = memory.operands.values,
        .dkeys = gradients_.key ? memory.dkeys : nullptr,
        .dvalues = gradients_.value ? memory.dvalues : nullptr,
        .finite = finite,
        .dscores =
            keeps ? element(problem_, gradients_.scores, span, row_index(span, 0)) + task.first * size : memory.dscores,
        .dscore_stride = keeps ? gradients_.scores.row / size : plan_.score_stride,
        .dproducts = memory.relative.dproducts ? memory.relative.dproducts + plan_.block_rows * size : nullptr,
        .dproduct_stride = plan_.score_stride,
        .dweights = gradients_.dweights ? element(problem_, gradients_.dweights, span, row_index(span, 0)) : nullptr,
        .dweight_stride = gradients_.dweights.row / size,
        .scratch = memory.kernel_scratch};
  }

  void add_dquery(const RowSpan& span, const BackwardThreadMemory& memory, bool first, bool last) const {
    const T scale = static_cast<T>(problem_.scale);
    for (int i = 0; i < span.valid; ++i) {
      T* own = reinterpret_cast<T*>(memory.dquery) + i * plan_.key_stride;
      if (problem_.relative) {
        const T* relative = reinterpret_cast<const T*>(memory.relative.dquery) + i * plan_.key_stride;
        for (std::int64_t d = 0; d < problem_.head_dim; ++d) own[d] += relative[d];
      }
      char* result = element(problem_, gradients_.query, span, row_index(span, i));
      T* sum = plan_.buffers_dquery
                   ? reinterpret_cast<T*>(shared_.dquery) + (row_index(problem_, span) + i) * problem_.head_dim
                   : reinterpret_cast<T*>(result);
      if (first)
        for (std::int64_t d = 0; d < problem_.head_dim; ++d) sum[d] = scale * own[d];
      else
        for (std::int64_t d = 0; d < problem_.head_dim; ++d) sum[d] += scale * own[d];
      if (last && plan_.buffers_dquery)
        scatter_row(*plan_.kernels, {result, gradients_.query.column, gradients_.query.dtype},
                    reinterpret_cast<const char*>(sum), type_of<T>, problem_.head_dim);
    }
  }

  static void clear(char* elements, std::int64_t count) {
    std::memset(elements, 0, static_cast<std::size_t>(count * size));
  }

  static constexpr std::int64_t size = static_cast<std::int64_t>(sizeof(T));

  const Problem& problem_;
  const Gradients& gradients_;
  const BackwardPlan& plan_;
  Scoring scoring_;
  const ScoreSums<T> sums_;
  const RelativeSums<T> relative_;
  const BackwardShared shared_;
  const RowPreparation<T> prepared_;
  TaskLoop& loop_;
};

}  // namespace

bool attend_backward(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan, int threads,
                     Interrupted interrupted) {
  const BackwardJob job{&problem, &gradients, &plan};
  return attend_backward(&job, 1, threads, interrupted);
}

int threads_for(const BackwardPlan& plan, int num_threads) {
  const BackwardJob job{nullptr, nullptr, &plan};
  return threads_for(&job, 1, num_threads);
}

bool attend_backward(const BackwardJob* jobs, std::int64_t count, int threads, Interrupted interrupted) {
  std::int64_t tasks = 0;
  for (std::int64_t i = 0; i < count; ++i) tasks += jobs[i].plan->tasks;
  if (tasks == 0) return true;
  return with_type(jobs->problem->dtype,
                   [&]<class T> { return BackwardRun<BackwardPart<T>>(jobs, count, threads, interrupted).execute(); });
}

}  // namespace selfattn
