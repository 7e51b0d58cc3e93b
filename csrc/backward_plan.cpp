#include <algorithm>

#include "backward.h"
#include "backward_memory.h"
#include "carver.h"

namespace selfattn {
namespace {

// The gradients of keys and values are summed over the rows of a block in registers, and then added to memory. Larger
// blocks need fewer of these additions.
constexpr int rows_wanted = 96;
// The scores of this many keys, and their gradients, stay in L1 between the products.
constexpr int largest_key_block = 96;
constexpr int smallest_key_block = 8;
// This many bytes of keys, values and their gradients stay in L2 while a task visits all rows.
constexpr std::int64_t range_bytes = std::int64_t{400} << 10;
constexpr int largest_range = 512;
// Bounds the scratch memory for very wide heads.
constexpr std::int64_t row_bytes_wanted = std::int64_t{256} << 10;

// Uses products of bfloat16 if there is a unit for them, all operands are bfloat16, and there are no relative products.
const BackwardKernel& kernel_for(const Problem& problem, const Gradients& gradients, const KernelSet& kernels) {
  const BackwardKernel* pairs = kernels.matrix.backward_bf16;
  const auto suits = [](const Operand& operand) { return operand.dtype == DType::bf16; };
  if (pairs && !problem.relative && suits(problem.query) && suits(problem.key) && suits(problem.value) &&
      suits(gradients.dout))
    return *pairs;
  return kernels.computing(problem.dtype).backward;
}

// Rows of operands are padded to whole vectors. A vector holds more numbers if they are narrow.
PaddedRows operand_form(const BackwardPlan& plan, const Problem& problem, std::int64_t width) {
  const DType dtype = plan.kernel->operands;
  return {width, round_up(width, plan.kernel->lanes * size_of(problem.dtype) / size_of(dtype)), dtype};
}

// Block sizes fix the order of sums. They do not depend on lengths, so that padding does not change results.
void choose_blocks(BackwardPlan& plan, const Problem& problem) {
  const std::int64_t row_bytes = (plan.key_stride + plan.value_stride) * size_of(problem.dtype);
  const std::int64_t operand_bytes = (plan.keys.stride + plan.values.stride) * size_of(plan.kernel->operands);
  const std::int64_t fitting = range_bytes / (operand_bytes + row_bytes);
  plan.key_block = static_cast<int>(std::clamp<std::int64_t>(fitting / smallest_key_block * smallest_key_block,
                                                             smallest_key_block, largest_key_block));
  plan.range_keys = static_cast<int>(
      std::clamp<std::int64_t>(fitting / plan.key_block * plan.key_block, plan.key_block, largest_range));
  const int strip = plan.kernel->strip_rows;
  const std::int64_t strips = std::min<std::int64_t>(rows_wanted / strip, row_bytes_wanted / row_bytes / strip);
  plan.block_rows = strip * static_cast<int>(std::max<std::int64_t>(strips, 1));
}

double flops_of(const Problem& problem, const Gradients& gradients) {
  const std::int64_t of_head_dim = 1 + gradients.through_keys() + bool{gradients.key} + bool{problem.relative} +
                                   2 * gradients.through_distances(problem);
  const std::int64_t of_value_dim = 1 + bool{gradients.value};
  return 2.0 * static_cast<double>(problem.batch * problem.num_heads) * static_cast<double>(problem.q_len) *
         static_cast<double>(problem.kv_len) *
         static_cast<double>(of_head_dim * problem.head_dim + of_value_dim * problem.value_dim);
}

RelativeMemory take_relative(Carver& carver, const BackwardPlan& plan, const Problem& problem,
                             const Gradients& gradients) {
  const std::int64_t size = size_of(problem.dtype), row = plan.key_stride * size;
  const std::int64_t columns = plan.block_rows + plan.range_keys - 1;
  RelativeMemory memory;
  if (gradients.through_distances(problem)) {
    memory.dproducts = carver.take<char>(plan.block_rows * (plan.score_stride + 1) * size);
    memory.queries = carver.take<char>(plan.block_rows * row);
    memory.dquery = carver.take<char>(plan.block_rows * row);
    memory.vectors = carver.take<char>(columns * row);
  }
  if (gradients.relative) {
    memory.dvectors = carver.take<char>(columns * row);
    for (double*& end : memory.ends) end = carver.take<double>(problem.head_dim);
  }
  if (gradients.key_bias) memory.key_bias = carver.take<double>(problem.head_dim);
  if (gradients.relative_bias) memory.relative_bias = carver.take<double>(problem.head_dim);
  return memory;
}

}  // namespace

BackwardThreadMemory::BackwardThreadMemory(char* base, const BackwardPlan& plan, const Problem& problem,
                                           const Gradients& gradients) {
  const std::int64_t size = size_of(problem.dtype), rows_ = plan.block_rows, keys_ = plan.range_keys;
  Carver carver{base};
  const auto take = [&](std::int64_t count) { return carver.take<char>(count * size); };
  const auto take_rows = [&](const PaddedRows& form, std::int64_t count) {
    return carver.take<char>(count * form.stride * size_of(form.dtype));
  };
  rows = carver.take<Row>(rows_);
  queries = take_rows(plan.keys, rows_);
  dout = take(rows_ * plan.value_stride);
  out = take(rows_ * plan.value_stride);
  dquery = take(rows_ * plan.key_stride);
  keys = take_rows(plan.keys, keys_);
  values = take_rows(plan.values, keys_);
  dkeys = take(keys_ * plan.key_stride);
  dvalues = take(keys_ * plan.value_stride);
  dscores = gradients.sums_scores() ? take(rows_ * plan.score_stride) : nullptr;
  columns = gradients.sums_scores() ? take(rows_ + plan.score_stride) : nullptr;
  kernel_scratch = carver.take<char>(static_cast<std::int64_t>(
      plan.kernel->scratch_bytes(plan.block_rows, plan.key_block, problem.head_dim, problem.value_dim)));
  distance = take_distance_memory(carver, problem, plan.relative, rows_, keys_);
  distance_sums = gradients.distance_bias ? carver.take<double>(problem.distance_bias.count) : nullptr;
  relative = take_relative(carver, plan, problem, gradients);
  bytes = carver.used;
}

BackwardShared::BackwardShared(char* base, const BackwardPlan& plan, const Problem& problem) {
  const std::int64_t size = size_of(problem.dtype), heads = problem.batch * problem.num_heads;
  const std::int64_t rows = heads * plan.row_blocks * plan.block_rows;
  Carver carver{base};
  shift = carver.take<char>(rows * size);
  factor = carver.take<char>(rows * size);
  delta = carver.take<char>(rows * size);
  dquery = plan.buffers_dquery ? carver.take<char>(heads * problem.q_len * problem.head_dim * size) : nullptr;
  rows_prepared = carver.take<std::atomic<std::int32_t>>(plan.row_tasks);
  progress = carver.take<std::atomic<std::int64_t>>(plan.tasks - plan.row_tasks);
  bytes = carver.used;
}

BackwardPlan make_backward_plan(const Problem& problem, const Gradients& gradients, const KernelSet& kernels) {
  BackwardPlan plan{};
  plan.kernels = &kernels;
  plan.kernel = &kernel_for(problem, gradients, kernels);
  plan.key_stride = round_up(problem.head_dim, plan.kernel->lanes);
  plan.value_stride = round_up(problem.value_dim, plan.kernel->lanes);
  plan.keys = operand_form(plan, problem, problem.head_dim);
  plan.values = operand_form(plan, problem, problem.value_dim);
  choose_blocks(plan, problem);
  plan.relative = {&kernels, &kernels.computing(problem.dtype), /*copies=*/true, plan.range_keys};
  // There is room between rows, so that a row can be read with a shift of up to block_rows - 1 elements.
  plan.score_stride =
      round_up(plan.range_keys + (gradients.through_distances(problem) ? plan.block_rows : 0), plan.kernel->lanes);
  plan.row_blocks = ceil_div(problem.q_len, plan.block_rows);
  plan.ranges = gradients.through_pairs() ? ceil_div(problem.kv_len, plan.range_keys) : 0;
  plan.buffers_dquery = gradients.query && !(gradients.query.in_place && gradients.query.dtype == problem.dtype);
  plan.row_tasks = problem.batch * problem.num_heads * plan.row_blocks;
  plan.tasks = plan.row_tasks + problem.batch * problem.num_kv_heads * plan.ranges;
  plan.flops = flops_of(problem, gradients);
  plan.thread_bytes = BackwardThreadMemory(nullptr, plan, problem, gradients).bytes;
  plan.shared_bytes = BackwardShared(nullptr, plan, problem).bytes;
  return plan;
}

Work work_of(const BackwardJob* jobs, std::int64_t count) {
  Work work{"attention gradients", count > 0 ? jobs->plan->kernel : nullptr, 0, 0, 0};
  for (std::int64_t i = 0; i < count; ++i) {
    work.flops += jobs[i].plan->flops;
    work.tasks += jobs[i].plan->tasks;
  }
  return work;
}

int threads_for(const BackwardJob* jobs, std::int64_t count, int num_threads) {
  return useful_threads(work_of(jobs, count), num_threads);
}

}  // namespace selfattn
