#include "backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <thread>

#include "backward_memory.h"
#include "rows.h"
#include "score_rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// Copies rows of an operand to contiguous rows of T, zero-padded to `step` elements.
struct RowSource {
  const char* data;
  DType dtype;
  std::int64_t row, column;  // strides in bytes
};

template <class T>
constexpr DType type_of = sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;

template <class T>
void gather(const KernelSet& kernels, const RowSource& from, std::int64_t rows, std::int64_t width, std::int64_t step,
            char* to) {
  const std::int64_t size = static_cast<std::int64_t>(sizeof(T));
  if (width == step)
    return gather_rows(kernels, to, type_of<T>, from.data, from.dtype, from.row, from.column, rows, width);
  for (std::int64_t r = 0; r < rows; ++r, to += step * size) {
    gather_rows(kernels, to, type_of<T>, from.data + r * from.row, from.dtype, 0, from.column, 1, width);
    std::memset(to + width * size, 0, static_cast<std::size_t>((step - width) * size));
  }
}

template <class T>
class BackwardRun {
 public:
  BackwardRun(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan, Interrupted interrupted)
      : problem_(problem),
        gradients_(gradients),
        plan_(plan),
        terms_(score_terms(problem)),
        memory_(plan.shared_bytes + plan.thread_bytes * static_cast<std::size_t>(plan.threads)),
        shared_(memory_.data(), plan, problem),
        loop_(plan.tasks, plan.threads, interrupted) {
    // The rows of a block belong to one head, so that they share one line of biases by distance.
    terms_.toeplitz = problem.distance_bias && !problem.bias && !problem.mask;
    std::uninitialized_value_construct_n(shared_.rows_prepared, plan.row_tasks);
    std::uninitialized_value_construct_n(shared_.progress, plan.tasks - plan.row_tasks);
  }

  bool execute() { return loop_.run(*this); }

  void operator()(std::int64_t index, int slot_index) noexcept {
    char* own = memory_.data() + plan_.shared_bytes + plan_.thread_bytes * static_cast<std::size_t>(slot_index);
    const BackwardSlot slot(own, plan_, problem_, gradients_);
    if (index < plan_.row_tasks) {
      prepare_rows(index, slot);
      shared_.rows_prepared[index].store(1, std::memory_order_release);
      return;
    }
    index -= plan_.row_tasks;
    // All heads for the first keys, then all heads for the next ones: a task needs what the task of the range before
    // has done, which then was started long ago.
    const std::int64_t heads = problem_.batch * problem_.num_kv_heads;
    Task task{index, index / heads, index % heads / problem_.num_kv_heads, index % problem_.num_kv_heads, slot_index};
    task.first = task.range * plan_.range_keys;
    task.count = static_cast<int>(std::min<std::int64_t>(problem_.kv_len - task.first, plan_.range_keys));
    visit_rows(task, slot);
  }

 private:
  struct Task {
    std::int64_t index, range, batch, kv_head;
    int slot;
    std::int64_t first = 0;  // key
    int count = 0;
    bool finite = false;  // its keys and values are
  };

  RowSpan span_of(std::int64_t batch, std::int64_t head, std::int64_t block) const {
    return make_span(problem_, batch, head, 1, block * plan_.block_rows, plan_.block_rows);
  }

  std::int64_t row_index(const RowSpan& span) const {
    return (span.batch * problem_.num_heads + span.first_head) * problem_.q_len + span.first;
  }
  std::int64_t padded_row_index(const RowSpan& span) const {
    return (span.batch * problem_.num_heads + span.first_head) * plan_.row_blocks * plan_.block_rows + span.first;
  }

  RowSource rows_of(const Operand& operand, const RowSpan& span) const {
    return {element(problem_, operand, span, place_of(span, 0)), operand.dtype, operand.row, operand.column};
  }

  // What the kernel needs to know about each row, and the results of rows that see no key.
  void prepare_rows(std::int64_t index, const BackwardSlot& slot) noexcept {
    const std::int64_t block = index % plan_.row_blocks, head = index / plan_.row_blocks % problem_.num_heads;
    const RowSpan span = span_of(index / plan_.row_blocks / problem_.num_heads, head, block);
    const std::int64_t lanes = plan_.kernel->lanes, first = padded_row_index(span);
    T* shift = reinterpret_cast<T*>(shared_.shift) + first;
    T* factor = reinterpret_cast<T*>(shared_.factor) + first;
    T* delta = reinterpret_cast<T*>(shared_.delta) + first;
    gather<T>(*plan_.kernels, rows_of(gradients_.dout, span), span.valid, problem_.value_dim, plan_.value_step,
              slot.dout);
    gather<T>(*plan_.kernels, rows_of(problem_.out, span), span.valid, problem_.value_dim, plan_.value_step, slot.out);
    const ValidKeys valid = valid_keys(problem_, span.batch);
    for (int i = 0; i < span.valid; ++i) {
      const Place place = place_of(span, i);
      const double lse = read_real(element(problem_, problem_.lse, span, place), problem_.lse.dtype);
      const bool empty = lse == -infinity;
      double sum = plan_.kernel->dot(slot.dout + i * plan_.value_step * size, slot.out + i * plan_.value_step * size,
                                     plan_.value_step);
      if (gradients_.dlse) sum -= read_real(element(problem_, gradients_.dlse, span, place), gradients_.dlse.dtype);
      const Row row = describe_row(problem_, span, place, valid);
      const double peak = lse * log2_e + row.omitted;
      // The factor makes up for the rounding of the shift.
      shift[i] = static_cast<T>(empty ? 0 : peak);
      factor[i] = static_cast<T>(empty ? 0 : std::exp2(static_cast<double>(shift[i]) - peak));
      delta[i] = static_cast<T>(sum);
      if (gradients_.sinks && !empty) gradients_.sinks[row_index(span) + i] = -std::exp2(row.sink - peak) * sum;
    }
    for (std::int64_t i = span.valid; i < ceil_div(span.count, lanes) * lanes; ++i) shift[i] = factor[i] = delta[i] = 0;
    const KeyRange seen = span_keys(problem_, span);
    const int unseen = seen.begin < seen.end ? span.valid : 0;
    if (gradients_.query) clear(gradients_.query, span, unseen);
  }

  // Zeros in the rows of the span from `first` on.
  void clear(const Operand& operand, const RowSpan& span, int first) const {
    for (int i = first; i < span.count; ++i) {
      char* row = element(problem_, operand, span, place_of(span, i));
      for (std::int64_t d = 0; d < problem_.head_dim; ++d) write_real(row + d * operand.column, 0, operand.dtype);
    }
  }

  // Waits until a task has passed the block of rows. Such a task was started before, by a thread that does not wait for
  // this one. Returns false if the call was interrupted.
  bool wait_for(std::int64_t task, std::int64_t block, int slot) noexcept {
    for (int spins = 0; shared_.progress[task].load(std::memory_order_acquire) <= block; ++spins) {
      if (spins < 200) continue;
      if (loop_.should_stop(slot)) return false;
      std::this_thread::yield();
    }
    return true;
  }

  void visit_rows(Task& task, const BackwardSlot& slot) noexcept {
    load_keys(task, slot);
    const std::int64_t blocks = problem_.group_size * plan_.row_blocks;
    const std::int64_t heads = problem_.batch * problem_.num_kv_heads;
    for (std::int64_t block = 0; block < blocks; ++block) {
      if (loop_.should_stop(task.slot)) return;
      const std::int64_t head = task.kv_head * problem_.group_size + block / plan_.row_blocks;
      const RowSpan span = span_of(task.batch, head, block % plan_.row_blocks);
      const KeyRange seen = span_keys(problem_, span);
      if (seen.begin < task.first + task.count && task.first < seen.end && seen.begin < seen.end)
        if (!visit(task, span, seen, block, slot)) return;
      if (gradients_.distance_bias && !sum_distances(task, block, slot)) return;
      // Who shares gradients of scores relies on all tasks before, also on those that skipped the block.
      if (gradients_.shares_scores && task.index % heads > 0 &&
          !wait_for(task.index - 1, blocks_before(block), task.slot))
        return;
      shared_.progress[task.index].store(block + 1, std::memory_order_release);
    }
    store_keys(task, slot);
  }

  // The last block that the KV head before must have finished before this one may add to shared gradients: the same
  // rows of its last head.
  std::int64_t blocks_before(std::int64_t block) const {
    return (problem_.group_size - 1) * plan_.row_blocks + block % plan_.row_blocks;
  }

  void load_keys(Task& task, const BackwardSlot& slot) const {
    const auto source = [&](const Operand& operand) {
      return RowSource{problem_.at(operand, task.batch) + task.kv_head * operand.head + task.first * operand.row,
                       operand.dtype, operand.row, operand.column};
    };
    gather<T>(*plan_.kernels, source(problem_.key), task.count, problem_.head_dim, plan_.key_step, slot.keys);
    gather<T>(*plan_.kernels, source(problem_.value), task.count, problem_.value_dim, plan_.value_step, slot.values);
    if (slot.distance_sums) std::fill_n(slot.distance_sums, problem_.distance_bias.count, 0.0);
    // Kernels leave out the padding of these rows, which add_row_results multiplies by 0.
    std::memset(slot.dquery, 0, static_cast<std::size_t>(plan_.block_rows * plan_.key_step * size));
    std::memset(slot.dkeys, 0, static_cast<std::size_t>(task.count * plan_.key_step * size));
    std::memset(slot.dvalues, 0, static_cast<std::size_t>(task.count * plan_.value_step * size));
    task.finite = plan_.kernel->finite(slot.keys, task.count * plan_.key_step) &&
                  plan_.kernel->finite(slot.values, task.count * plan_.value_step);
  }

  void store_keys(const Task& task, const BackwardSlot& slot) const {
    const auto store = [&](const Operand& operand, char* rows, std::int64_t width, std::int64_t step, double factor) {
      if (!operand) return;
      char* to = problem_.at(operand, task.batch) + task.kv_head * operand.head + task.first * operand.row;
      for (int i = 0; i < task.count; ++i, to += operand.row, rows += step * size) {
        if (factor != 1) scale_row(rows, type_of<T>, width, factor);
        scatter_row(*plan_.kernels, to, operand.dtype, operand.column, rows, type_of<T>, width);
      }
    };
    store(gradients_.key, slot.dkeys, problem_.head_dim, plan_.key_step, problem_.scale);
    store(gradients_.value, slot.dvalues, problem_.value_dim, plan_.value_step, 1);
  }

  // At the end of a head, adds its gradients by distance to those of the keys before; clears them for the next head.
  bool sum_distances(const Task& task, std::int64_t block, const BackwardSlot& slot) noexcept {
    if (block % plan_.row_blocks != plan_.row_blocks - 1) return true;
    if (task.range > 0 && !wait_for(task.index - problem_.batch * problem_.num_kv_heads, block, task.slot))
      return false;
    const std::int64_t head = task.kv_head * problem_.group_size + block / plan_.row_blocks;
    const std::int64_t count = problem_.distance_bias.count;
    double* sums = gradients_.distance_bias + (task.batch * problem_.num_heads + head) * count;
    for (std::int64_t i = 0; i < count; ++i) sums[i] += slot.distance_sums[i];
    std::fill_n(slot.distance_sums, count, 0.0);
    return true;
  }

  bool visit(const Task& task, const RowSpan& span, const KeyRange& seen, std::int64_t block,
             const BackwardSlot& slot) noexcept {
    const ValidKeys valid = valid_keys(problem_, span.batch);
    for (int i = 0; i < span.valid; ++i) slot.rows[i] = describe_row(problem_, span, place_of(span, i), valid);
    if (problem_.distance_bias)
      DistanceTerms(problem_, plan_.relative, span, slot.rows, slot.distance)
          .prepare(task.first, task.count, task.first + task.count);
    gather<T>(*plan_.kernels, rows_of(problem_.query, span), span.valid, problem_.head_dim, plan_.key_step,
              slot.queries);
    gather<T>(*plan_.kernels, rows_of(gradients_.dout, span), span.valid, problem_.value_dim, plan_.value_step,
              slot.dout);
    const std::int64_t row_task =
        (span.batch * problem_.num_heads + span.first_head) * plan_.row_blocks + block % plan_.row_blocks;
    while (shared_.rows_prepared[row_task].load(std::memory_order_acquire) == 0)
      if (loop_.should_stop(task.slot)) return false;
    if (slot.dscores)
      std::memset(slot.dscores, 0, static_cast<std::size_t>(span.valid * std::int64_t{plan_.range_keys} * size));
    plan_.kernel->run(block_of(task, span, slot));

    const bool first = seen.begin / plan_.range_keys == task.range;
    const bool last = (seen.end - 1) / plan_.range_keys == task.range;
    const std::int64_t heads = problem_.batch * problem_.num_kv_heads;
    if (gradients_.shares_scores && task.index % heads > 0 &&
        !wait_for(task.index - 1, blocks_before(block), task.slot))
      return false;
    if (gradients_.key_sums || gradients_.scores) add_dscores(task, span, slot);
    if (gradients_.distance_bias) add_distances(task, span, slot);
    if (!first && !wait_for(task.index - heads, block, task.slot)) return false;
    add_row_results(task, span, slot);
    if (gradients_.query) add_dquery(span, slot, first, last);
    return true;
  }

  BackwardBlock block_of(const Task& task, const RowSpan& span, const BackwardSlot& slot) const {
    const std::int64_t row = padded_row_index(span) * size;
    const bool finite = task.finite && plan_.kernel->finite(slot.queries, span.valid * plan_.key_step) &&
                        plan_.kernel->finite(slot.dout, span.valid * plan_.value_step);
    return {.rows = slot.rows,
            .count = span.valid,
            .terms = terms_,
            .head_dim = problem_.head_dim,
            .value_dim = problem_.value_dim,
            .queries = slot.queries,
            .dout = slot.dout,
            .shift = shared_.shift + row,
            .factor = shared_.factor + row,
            .delta = shared_.delta + row,
            .dquery = slot.dquery,
            .first_key = task.first,
            .key_count = task.count,
            .key_block = plan_.key_block,
            .keys = slot.keys,
            .values = slot.values,
            .dkeys = slot.dkeys,
            .dvalues = slot.dvalues,
            .finite = finite,
            .dscores = slot.dscores,
            .dscore_step = plan_.range_keys,
            .dweights = gradients_.dweights ? element(problem_, gradients_.dweights, span, place_of(span, 0)) : nullptr,
            .dweight_step = gradients_.dweights.row / size,
            .scratch = slot.kernel_scratch};
  }

  const T* dscores_of(const BackwardSlot& slot, int row) const {
    return reinterpret_cast<const T*>(slot.dscores) + row * std::int64_t{plan_.range_keys};
  }

  void add_dscores(const Task& task, const RowSpan& span, const BackwardSlot& slot) const {
    T* sums = gradients_.key_sums
                  ? reinterpret_cast<T*>(gradients_.key_sums) +
                        (span.batch * problem_.num_heads + span.first_head) * problem_.kv_len + task.first
                  : nullptr;
    for (int i = 0; i < span.valid; ++i) {
      const T* from = dscores_of(slot, i);
      if (sums)
        for (int j = 0; j < task.count; ++j) sums[j] += from[j];
      if (!gradients_.scores) continue;
      T* to = reinterpret_cast<T*>(element(problem_, gradients_.scores, span, place_of(span, i))) + task.first;
      for (int j = 0; j < task.count; ++j) to[j] += from[j];
    }
  }

  void add_distances(const Task& task, const RowSpan& span, const BackwardSlot& slot) const {
    const ByDistance& table = problem_.distance_bias;
    for (int i = 0; i < span.valid; ++i) {
      const T* from = dscores_of(slot, i);
      const std::int64_t first = place_of(span, i).query + problem_.offset_of(span.batch) - task.first + table.origin;
      for (int j = 0; j < task.count; ++j)
        slot.distance_sums[std::clamp<std::int64_t>(first - j, 0, table.count - 1)] += static_cast<double>(from[j]);
    }
  }

  void add_row_results(const Task& task, const RowSpan& span, const BackwardSlot& slot) const {
    const std::int64_t index = row_index(span);
    const std::int64_t offset = problem_.offset_of(span.batch);
    for (int i = 0; i < span.valid; ++i) {
      if (gradients_.scale)
        gradients_.scale[index + i] += plan_.kernel->dot(slot.queries + i * plan_.key_step * size,
                                                         slot.dquery + i * plan_.key_step * size, plan_.key_step);
      if (!gradients_.slopes && !gradients_.row_sums) continue;
      const T* from = dscores_of(slot, i);
      const double position = static_cast<double>(place_of(span, i).query + offset - task.first);
      double sum = 0, moment = 0;
      for (int j = 0; j < task.count; ++j) {
        sum += static_cast<double>(from[j]);
        moment += static_cast<double>(from[j]) * std::abs(position - j);
      }
      if (gradients_.slopes) gradients_.slopes[index + i] -= moment;
      if (gradients_.row_sums) gradients_.row_sums[index + i] += sum;
    }
  }

  void add_dquery(const RowSpan& span, const BackwardSlot& slot, bool first, bool last) const {
    const T scale = static_cast<T>(problem_.scale);
    for (int i = 0; i < span.valid; ++i) {
      const T* part = reinterpret_cast<const T*>(slot.dquery) + i * plan_.key_step;
      char* result = element(problem_, gradients_.query, span, place_of(span, i));
      T* sum = plan_.buffers_dquery ? reinterpret_cast<T*>(shared_.dquery) + (row_index(span) + i) * problem_.head_dim
                                    : reinterpret_cast<T*>(result);
      for (std::int64_t d = 0; d < problem_.head_dim; ++d) sum[d] = first ? scale * part[d] : sum[d] + scale * part[d];
      if (last && plan_.buffers_dquery)
        scatter_row(*plan_.kernels, result, gradients_.query.dtype, gradients_.query.column,
                    reinterpret_cast<const char*>(sum), type_of<T>, problem_.head_dim);
    }
  }

  static constexpr std::int64_t size = static_cast<std::int64_t>(sizeof(T));

  const Problem& problem_;
  const Gradients& gradients_;
  const BackwardPlan& plan_;
  ScoreTerms terms_;
  const Scratch memory_;
  const BackwardShared shared_;
  TaskLoop loop_;
};

}  // namespace

bool attend_backward(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan,
                     Interrupted interrupted) {
  if (plan.tasks == 0) return true;
  return problem.dtype == DType::f32 ? BackwardRun<float>(problem, gradients, plan, interrupted).execute()
                                     : BackwardRun<double>(problem, gradients, plan, interrupted).execute();
}

}  // namespace selfattn
