#include "plan.h"

#include <algorithm>
#include <bit>

#include "thread_memory.h"

namespace selfattn {
namespace {

// The scores of 128 keys for a strip of 48 rows take 24 KiB in float32 and stay in L1 between the two products.
constexpr int largest_key_block = 128;
// The row kernel has few rows and thus few scores, so that longer blocks fit. Longer blocks switch less often between
// reading K and reading V.
constexpr int largest_row_key_block = 512;
constexpr std::int64_t row_key_block_bytes = std::int64_t{1} << 20;  // limits the copies, if K and V must be copied
constexpr int smallest_key_block = 8;
// Larger K and V blocks would be evicted from L2 between the strips of a row block.
constexpr std::int64_t key_block_bytes = std::int64_t{512} << 10;
// With more strips in a block, each K and V block that is loaded into L2 is used more often; fewer strips give more
// tasks to balance.
constexpr int fewest_strips = 2;
constexpr int most_strips = 8;
constexpr std::int64_t blocks_wanted = 8;         // row blocks per KV head
constexpr std::int64_t packed_blocks_wanted = 2;  // fewer row blocks pack K and V less often
// Queries and outputs of a row block stay in L2 together with the K and V block.
constexpr std::int64_t row_block_bytes = std::int64_t{448} << 10;
constexpr std::size_t largest_scratch = std::size_t{2} << 20;
// The packed operands of wider heads would leave too little room for rows.
constexpr std::int64_t widest_packed = 4096;  // head_dim + value_dim
// A few rows give too few tasks for a team, so the keys are split as well. Merging costs one pass over `rows` outputs
// per range, which is negligible compared with reading this many keys.
constexpr std::int64_t row_range_keys = 1024;
constexpr std::int64_t tile_range_keys = 2048;
constexpr std::int64_t row_blocks_with_ranges = 2;
// For the key mass, each row task has its own sums. So there are few row tasks, but enough to balance threads.
constexpr std::int64_t row_tasks_with_mass = 8;
static_assert(row_tasks_with_mass >= row_blocks_with_ranges);  // a row task whose keys are split has one row block
constexpr std::int64_t most_ranges = 256;  // bounds the memory for partial results, even for huge broadcast views
// The relative products of this many keys stay in L2 until the keys are processed. Each such stretch of keys needs
// additional panels for the distances at its ends. With more keys per stretch, this costs less per key.
constexpr std::int64_t relative_keys_wanted = 512;
constexpr int relative_strips = 2;

// Whether kernels for `dtype` can use an Operand or a PerHead without a copy.
bool in_place(const auto& operand, DType dtype) { return operand.in_place && operand.dtype == dtype; }

int choose_key_block(const Problem& problem, std::int64_t bytes, std::int64_t largest) {
  const std::int64_t row_bytes = (problem.head_dim + problem.value_dim) * size_of(problem.dtype);
  const std::int64_t fitting = bytes / row_bytes / smallest_key_block * smallest_key_block;
  const std::int64_t block = std::clamp<std::int64_t>(fitting, smallest_key_block, largest);
  // If pieces are cut at multiples of largest_row_key_block, results must not depend on the cuts. So the block size is
  // a power of two: then no block straddles a cut.
  return static_cast<int>(problem.running ? std::bit_floor(static_cast<std::uint32_t>(block)) : block);
}

// The row kernel costs about as much per row as the tile kernel costs per lane. So the row kernel wins if the tile
// kernel would leave at least a quarter of the lanes of one or two vectors empty and there are many keys. The choice
// must not depend on the number of keys, because results would then depend on that number, too. A few queries of
// grouped heads indicate decoding, which has many keys.
bool row_kernel_pays(const Plan& plan, const Problem& problem) {
  if (problem.dropout != 0) return false;  // only the tile kernel applies dropout
  if (plan.rows <= plan.types->row_limit) return true;
  const std::int64_t vector = plan.types->lanes;
  const std::int64_t lanes = round_up(plan.rows, vector);
  // The tile kernel needs 16-bit keys widened or packed. One vector of rows does not amortise that. With grouped heads,
  // one and a half vectors do not amortise it either.
  if (is_narrow(problem.key.dtype) && plan.rows <= (problem.group_size > 1 ? 3 * vector / 2 : vector)) return true;
  return problem.group_size > 1 && lanes <= 2 * vector && 4 * plan.rows <= 3 * lanes;
}

// The type of queries that kernels get: adding u or w widens 16-bit queries to the type of computation.
DType query_type(const Problem& problem) { return problem.relative ? problem.dtype : problem.query.dtype; }

// Whether the kernel takes the problem's queries, in their own type or converted to the type of computation, and its
// head_dim.
bool suits(const AttendKernel& kernel, const Problem& problem) {
  const DType queries = query_type(problem);
  return (kernel.queries == queries || kernel.queries == computed_in(queries)) && problem.head_dim <= kernel.widest;
}

// Kernels widen narrow keys and values as they load them: decoding is limited by memory bandwidth, and narrow numbers
// take less of it. Narrow numbers that cannot be read in place are converted to the type of computation, in copies.
// Codes are converted only if there is no kernel for them. Elements that share words are unpacked, in copies.
const AttendKernel* row_kernel(const KernelSet& kernels, const TypeKernels& types, const Problem& problem) {
  const DType dtype = unpacked_type(problem.key.dtype);
  // Chosen even if operands must be copied: kernels differ in their results, which must not depend on strides.
  if (const AttendKernel* dots = kernels.matrix.row[dtype]; dots && suits(*dots, problem)) return dots;
  const AttendKernel* own = types.of(dtype).row;
  const bool reads = own && (is_scaled(dtype) || (in_place(problem.key, dtype) && in_place(problem.value, dtype)));
  return reads ? own : types.of(problem.dtype).row;
}

// The kernel on the matrix unit if there is one for these operands that is faster than FMA, otherwise the one on FMA.
const AttendKernel* tile_kernel(const KernelSet& kernels, const TypeKernels& types, const Problem& problem) {
  const MatrixKernels& matrix = kernels.matrix;
  const auto all = [&](DType dtype) {
    return query_type(problem) == dtype && problem.key.dtype == dtype && problem.value.dtype == dtype;
  };
  const AttendKernel* found = nullptr;
  if (problem.head_dim + problem.value_dim > widest_packed) return &types.tile;
  if (all(DType::bf16)) found = matrix.bf16;
  if (all(DType::f16)) found = matrix.f16;
  if (all(DType::f32)) {
    const AttendKernel* const kernel[] = {matrix.f32_highest, matrix.f32_high, matrix.f32_medium};
    found = kernel[static_cast<int>(problem.precision)];
  }
  return found ? found : &types.tile;
}

void choose_copies(Plan& plan, const Problem& problem) {
  plan.copies_queries = problem.relative || !in_place(problem.query, plan.attend->queries);
  const bool apart = problem.pages.size != 0 && !plan.attend->by_row;
  plan.copies_keys = apart || !in_place(problem.key, plan.attend->keys);
  plan.copies_relative = problem.relative && !in_place(problem.relative.rows, problem.dtype);
  plan.copies_values = apart || !in_place(problem.value, plan.attend->keys);
}

std::int64_t relative_keys(const Plan& plan) {
  return std::max<std::int64_t>(relative_keys_wanted / plan.key_block, 1) * plan.key_block;
}

// Makes the last block about as large as the others, unless this takes more strips.
std::int64_t equal_blocks(std::int64_t rows, std::int64_t block, int strip, int lanes) {
  const auto strips = [&](std::int64_t size) {
    return rows / size * ceil_div(size, strip) + ceil_div(rows % size, strip);
  };
  const std::int64_t equal = round_up(ceil_div(rows, ceil_div(rows, block)), lanes);
  return strips(equal) > strips(block) ? block : equal;
}

void choose_kernel(Plan& plan, const Problem& problem) {
  if (row_kernel_pays(plan, problem)) {
    plan.attend = row_kernel(*plan.kernels, *plan.types, problem);
    plan.key_block = choose_key_block(problem, row_key_block_bytes, largest_row_key_block);
    plan.relative_keys = relative_keys(plan);
    choose_copies(plan, problem);
    plan.reason = "few query rows per KV head: vectors run along the heads' dimensions";
    plan.block_rows = static_cast<int>(std::max<std::int64_t>(plan.rows, 1));
    return;
  }
  plan.attend = tile_kernel(*plan.kernels, *plan.types, problem);
  plan.key_block = choose_key_block(problem, key_block_bytes, largest_key_block);
  plan.relative_keys = relative_keys(plan);
  plan.reason = problem.dropout != 0 ? "dropout" : "enough query rows per KV head to fill vectors";
  const int strip = plan.attend->strip_rows;
  const std::int64_t row_bytes = (problem.head_dim + problem.value_dim) * size_of(problem.dtype);
  const std::int64_t fitting = row_block_bytes / row_bytes / strip;
  const std::int64_t wanted = plan.attend->packs ? packed_blocks_wanted : blocks_wanted;
  const std::int64_t strips = std::min(plan.rows / wanted / strip, fitting);
  const std::int64_t most = problem.relative ? relative_strips : most_strips;
  // Each block packs all keys and values, so a prompt of at most three strips is one block.
  const bool in_one = plan.attend->packs && plan.rows <= std::int64_t{3} * strip && fitting > 3 && most > 3;
  plan.block_rows = strip * (in_one ? 3 : static_cast<int>(std::clamp<std::int64_t>(strips, fewest_strips, most)));
  if (plan.rows > plan.block_rows)
    plan.block_rows = static_cast<int>(equal_blocks(plan.rows, plan.block_rows, strip, plan.types->lanes));
  plan.block_rows = static_cast<int>(std::clamp<std::int64_t>(plan.rows, 1, plan.block_rows));
  // For very wide heads, use fewer rows to keep the scratch within its limit. Assume that all operands are copied:
  // block_rows affects the key ranges, and so the results, which must not depend on strides.
  plan.copies_queries = plan.copies_keys = plan.copies_values = plan.copies_out = true;
  plan.copies_relative = static_cast<bool>(problem.relative);
  for (int rows = strip; rows >= plan.types->lanes && ThreadMemory(nullptr, plan, problem).bytes > largest_scratch;
       rows -= plan.types->lanes)
    plan.block_rows = std::min(plan.block_rows, rows);
  choose_copies(plan, problem);
}

double cache_bytes(const Problem& problem) {
  return static_cast<double>(problem.batch) * static_cast<double>(problem.num_kv_heads) *
         static_cast<double>(problem.held_keys()) *
         static_cast<double>(row_bytes(problem.key.dtype, problem.head_dim) +
                             row_bytes(problem.value.dtype, problem.value_dim));
}

std::int64_t wanted_range(const Plan& plan) {
  const std::int64_t wanted = plan.attend->strip_rows > 1 ? tile_range_keys : row_range_keys;
  return round_up(wanted, plan.key_block);  // blocks never straddle ranges
}

// An upper bound for the number of ranges of an entry with at most `keys` keys.
std::int64_t most_ranges_of(const Plan& plan, std::int64_t keys) {
  return plan.splits_keys ? std::clamp<std::int64_t>(ceil_div(keys, wanted_range(plan)), 1, most_ranges) : 1;
}

}  // namespace

Ranges ranges_of(const Plan& plan, std::int64_t keys) {
  if (most_ranges_of(plan, keys) == 1) return {std::max<std::int64_t>(keys, 1), 1};
  const std::int64_t range = std::max(wanted_range(plan), ceil_div(keys, most_ranges));
  const std::int64_t range_keys = round_up(range, plan.key_block);
  return {range_keys, ceil_div(keys, range_keys)};
}

Plan make_plan(const Problem& problem, const KernelSet& kernels) {
  Plan plan{};
  plan.kernels = &kernels;
  plan.types = &kernels.computing(problem.dtype);
  plan.rows = problem.q_len * problem.group_size;
  choose_kernel(plan, problem);
  plan.row_blocks = ceil_div(plan.rows, plan.block_rows);

  // Keys are not split if there are running sums, because these are continued in the order of the keys.
  plan.splits_keys = plan.row_blocks <= row_blocks_with_ranges && !problem.running;
  plan.range_keys = ranges_of(plan, problem.kv_len).keys;
  plan.ranges = most_ranges_of(plan, problem.kv_len);
  const bool rounds = is_narrow(problem.out.dtype) && problem.out.in_place && plan.ranges == 1;
  plan.out_type = rounds ? problem.out.dtype : problem.dtype;
  plan.copies_out = !in_place(problem.out, plan.out_type);
  plan.row_tasks = problem.key_mass ? std::min(plan.row_blocks, row_tasks_with_mass) : plan.row_blocks;
  plan.keeps_scores = problem.key_mass && !problem.weights;
  plan.tasks = problem.batch * problem.num_kv_heads * plan.row_tasks * plan.ranges;

  const std::int64_t products = problem.relative ? 2 : 1;
  plan.flops = 2.0 * static_cast<double>(problem.batch) * static_cast<double>(problem.num_heads) *
               static_cast<double>(problem.q_len) * static_cast<double>(problem.held_keys()) *
               static_cast<double>(products * problem.head_dim + problem.value_dim);
  plan.bytes = cache_bytes(problem);
  plan.thread_bytes = ThreadMemory(nullptr, plan, problem).bytes;
  plan.shared_bytes = Shared(nullptr, plan, problem).bytes;
  return plan;
}

}  // namespace selfattn
