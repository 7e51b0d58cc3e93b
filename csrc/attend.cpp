#include "attend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>

#include "key_source.h"
#include "row_block.h"
#include "scratch_pool.h"
#include "slot.h"
#include "task_loop.h"

namespace selfattn {
namespace {

struct Task {
  std::int64_t batch, kv_head, row_block, range;
};

class Run {
 public:
  Run(const Problem& problem, const Plan& plan, Interrupted interrupted)
      : problem_(problem),
        plan_(plan),
        terms_(score_terms(problem)),
        memory_(plan.shared_bytes + plan.thread_bytes * static_cast<std::size_t>(plan.threads)),
        shared_(memory_.data(), plan, problem),
        loop_(plan.tasks, plan.threads, interrupted) {
    if (plan.ranges > 1)
      std::uninitialized_value_construct_n(shared_.finished, shared_.num_units * problem.num_kv_heads);
    if (plan.threads > 1) order_units();
  }

  bool execute() { return loop_.run(*this); }

  void operator()(std::int64_t index, int slot) noexcept {
    char* own = memory_.data() + plan_.shared_bytes + plan_.thread_bytes * static_cast<std::size_t>(slot);
    attend_task(task_at(index), Slot(own, plan_, problem_), slot);
  }

 private:
  // Largest first, so that no thread is left alone with a long task at the end.
  void order_units() {
    Unit* unit = shared_.units;
    for (std::int64_t block = 0; block < plan_.row_blocks; ++block)
      for (std::int64_t b = 0; b < problem_.batch; ++b) {
        const KeyRange keys = span_keys(problem_, span_of(problem_, plan_, b, 0, block));
        *unit++ = {b, block, keys.end - keys.begin};
      }
    std::sort(shared_.units, unit, [](const Unit& a, const Unit& b) {
      return std::tie(b.cost, b.row_block, a.batch) < std::tie(a.cost, a.row_block, b.batch);
    });
  }

  Task task_at(std::int64_t index) const {
    const std::int64_t range = index % plan_.ranges;
    index /= plan_.ranges;
    const std::int64_t kv_head = index % problem_.num_kv_heads;
    index /= problem_.num_kv_heads;
    if (shared_.units) return {shared_.units[index].batch, kv_head, shared_.units[index].row_block, range};
    return {index / plan_.row_blocks, kv_head, index % plan_.row_blocks, range};
  }

  void attend_task(const Task& task, const Slot& slot, int slot_index) noexcept {
    const RowSpan span = span_of(problem_, plan_, task.batch, task.kv_head, task.row_block);
    if (task.range == 0) clear_rows(problem_, span);
    if (span.valid == 0) return;
    const bool parted = plan_.ranges > 1;
    const std::int64_t block_index =
        (task.batch * problem_.num_kv_heads + task.kv_head) * plan_.row_blocks + task.row_block;
    describe_rows(problem_, plan_, span, slot, /*with_sinks=*/problem_.sinks && !parted);

    RowBlock block{slot.rows,
                   span.valid,
                   plan_.key_block,
                   problem_.head_dim,
                   problem_.value_dim,
                   terms_,
                   plan_.out_type,
                   /*normalise=*/!parted,
                   slot.row_max,
                   slot.row_sum,
                   slot.kernel_scratch};
    if (parted) redirect(block, slot, shared_.partial(plan_, problem_, block_index, task.range));
    plan_.attend->begin(block);
    if (!absorb_keys(task, span, block, slot, slot_index)) return;
    plan_.attend->finish(block);
    if (!parted) return complete_rows(problem_, plan_, span, slot, slot.row_max, slot.row_sum);

    const Partial part = shared_.partial(plan_, problem_, block_index, task.range);
    const auto bytes = static_cast<std::size_t>(span.valid * size_of(problem_.dtype));
    std::memcpy(part.row_max, slot.row_max, bytes);
    std::memcpy(part.row_sum, slot.row_sum, bytes);
    // Whoever finishes last merges; acquire-release makes the other ranges' results visible to it.
    if (shared_.finished[block_index].fetch_add(1, std::memory_order_acq_rel) + 1 == plan_.ranges)
      merge_ranges(problem_, plan_, shared_, block_index, span, slot);
  }

  void redirect(const RowBlock& block, const Slot& slot, const Partial& part) const {
    for (int i = 0; i < block.count; ++i)
      slot.rows[i].out = part.out + i * problem_.value_dim * size_of(problem_.dtype);
  }

  // Blocks start at multiples of key_block, so a row's result does not depend on what its neighbours see.
  bool absorb_keys(const Task& task, const RowSpan& span, const RowBlock& block, const Slot& slot,
                   int slot_index) noexcept {
    const KeyRange keys = span_keys(problem_, span);
    const std::int64_t begin = std::max(keys.begin, task.range * plan_.range_keys);
    const std::int64_t end = std::min(keys.end, (task.range + 1) * plan_.range_keys);
    const StridedKeys source(problem_, plan_, slot, task.batch, task.kv_head);
    for (std::int64_t first = begin / plan_.key_block * plan_.key_block; first < end; first += plan_.key_block) {
      if (loop_.should_stop(slot_index)) return false;
      const int count = static_cast<int>(std::min<std::int64_t>(end - first, plan_.key_block));
      plan_.attend->absorb(block, source.block(first, count));
    }
    return true;
  }

  const Problem& problem_;
  const Plan& plan_;
  const ScoreTerms terms_;
  const Scratch memory_;
  const Shared shared_;
  TaskLoop loop_;
};

}  // namespace

bool attend(const Problem& problem, const Plan& plan, Interrupted interrupted) {
  const bool nothing_to_write = problem.value_dim == 0 && !problem.lse && !problem.weights;
  if (plan.tasks == 0 || nothing_to_write) return true;
  return Run(problem, plan, interrupted).execute();
}

}  // namespace selfattn
