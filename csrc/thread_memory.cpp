#include "thread_memory.h"

#include "arithmetic.h"
#include "carver.h"

namespace selfattn {
namespace {

std::int64_t score_bytes(const Plan& plan, const Problem& problem) {
  return plan.keeps_scores ? plan.block_rows * problem.kv_len * size_of(problem.dtype) : 0;
}

}  // namespace

ThreadMemory::ThreadMemory(char* base, const Plan& plan, const Problem& problem) {
  const std::int64_t size = size_of(problem.dtype);
  // Kernels write maxima and sums of whole strips.
  const std::int64_t lanes = round_up(plan.block_rows, plan.attend->strip_rows);
  Carver carver{base};
  const auto take_if = [&](bool needed, std::int64_t count, DType dtype) {
    return needed ? carver.take<char>(count * size_of(dtype)) : nullptr;
  };
  rows = carver.take<Row>(plan.block_rows);
  row_max = carver.take<char>(lanes * size);
  row_sum = carver.take<char>(lanes * size);
  kernel_scratch = carver.take<char>(static_cast<std::int64_t>(
      plan.attend->scratch_bytes(plan.block_rows, plan.key_block, problem.head_dim, problem.value_dim)));
  queries = take_if(plan.copies_queries, plan.block_rows * problem.head_dim, plan.attend->queries);
  keys = take_if(plan.copies_keys, plan.key_block * problem.head_dim, plan.attend->keys);
  values = take_if(plan.copies_values, plan.key_block * problem.value_dim, plan.attend->keys);
  out = take_if(plan.copies_out, plan.block_rows * problem.value_dim, problem.dtype);
  const std::int64_t listed = plan.key_block + (plan.attend->by_row ? rows_ahead : 0);
  key_rows = carver.take<const void*>(listed);
  value_rows = carver.take<const void*>(listed);
  // Kernels read whole vectors of scales.
  const std::int64_t scaled = is_scaled(problem.key.dtype) ? plan.key_block + rows_ahead : 0;
  key_scales = carver.take<float>(scaled);
  value_scales = carver.take<float>(scaled);
  mask_stride = plan.key_block;
  masks = carver.take<std::uint8_t>(problem.recent_mask ? plan.block_rows * mask_stride : 0);
  const RelativeProducts relative{plan.kernels, plan.types, plan.copies_relative, plan.relative_keys};
  distance = take_distance_memory(carver, problem, relative, plan.block_rows, plan.key_block);
  scores = carver.take<char>(plan.ranges == 1 ? score_bytes(plan, problem) : 0);
  mass = nullptr;
  bytes = carver.used;
}

Partial::Partial(char* base, const Plan& plan, const Problem& problem) {
  const std::int64_t size = size_of(problem.dtype);
  Carver carver{base};
  out = carver.take<char>(plan.block_rows * problem.value_dim * size);
  row_max = carver.take<char>(plan.block_rows * size);
  row_sum = carver.take<char>(plan.block_rows * size);
  bytes = carver.used;
}

Shared::Shared(char* base, const Plan& plan, const Problem& problem) {
  Carver carver{base};
  row_blocks = plan.ranges > 1 ? problem.batch * problem.num_kv_heads * plan.row_blocks : 0;
  finished = carver.take<std::atomic<std::int32_t>>(row_blocks);
  scores = carver.take<char>(row_blocks * score_bytes(plan, problem));
  mass = take_key_mass(carver, plan, problem);
  partial_bytes = Partial(nullptr, plan, problem).bytes;
  partials = carver.take<char>(row_blocks * plan.ranges * static_cast<std::int64_t>(partial_bytes));
  bytes = carver.used;
}

Partial Shared::partial(const Plan& plan, const Problem& problem, std::int64_t block, std::int64_t range) const {
  return {partials + static_cast<std::size_t>(block * plan.ranges + range) * partial_bytes, plan, problem};
}

char* Shared::scores_of(const Plan& plan, const Problem& problem, std::int64_t block) const {
  return scores + block * score_bytes(plan, problem);
}

}  // namespace selfattn
