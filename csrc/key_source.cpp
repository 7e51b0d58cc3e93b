#include "key_source.h"

#include <algorithm>
#include <cstring>

#include "rows.h"

namespace selfattn {

KeySource::KeySource(const Problem& problem, const Plan& plan, const ThreadMemory& memory, std::int64_t batch,
                     std::int64_t kv_head)
    : problem_(problem),
      plan_(plan),
      pages_(problem.pages.of(batch)),
      end_(std::min(problem.keys_of(batch), problem.held.end)),
      keys_{problem.key,
            problem.key_scales,
            problem.at(problem.key, batch) + kv_head * problem.key.head,
            problem.key_scales ? problem.at(problem.key_scales, batch) + kv_head * problem.key_scales.head : nullptr,
            problem.head_dim,
            plan.copies_keys,
            memory.keys,
            memory.key_rows,
            memory.key_scales},
      values_{problem.value,
              problem.value_scales,
              problem.at(problem.value, batch) + kv_head * problem.value.head,
              problem.value_scales ? problem.at(problem.value_scales, batch) + kv_head * problem.value_scales.head
                                   : nullptr,
              problem.value_dim,
              plan.copies_values,
              memory.values,
              memory.value_rows,
              memory.value_scales} {}

const char* KeySource::at(const Operand& operand, const char* base, std::int64_t key) const {
  return base + problem_.pages.offset(pages_, key - problem_.held.begin, operand.page, operand.row);
}

// Calls use(address, index, keys) for every run of equally spaced keys in [first, first + count); index is relative to
// `first`.
template <class Use>
void KeySource::each_run(const Operand& operand, const char* base, std::int64_t first, std::int64_t count,
                         Use use) const {
  const Pages& pages = problem_.pages;
  if (pages.size == 0) return use(at(operand, base, first), std::int64_t{0}, count);
  std::int64_t run = first / pages.size, slot = first % pages.size;
  for (std::int64_t done = 0; done < count; ++run, slot = 0) {
    const std::int64_t keys = std::min(count - done, pages.size - slot);
    use(base + pages.page_of(pages_, run) * operand.page + slot * operand.row, done, keys);
    done += keys;
  }
}

void KeySource::copy(const Input& input, std::int64_t first, int count) const {
  const DType type = plan_.attend->keys;
  const std::int64_t row = row_bytes(type, input.width);
  each_run(input.operand, input.base, first, count, [&](const char* from, std::int64_t index, std::int64_t keys) {
    char* to = input.copy + index * row;
    const SourceRows rows{{from, input.operand.row, input.operand.column}, input.operand.dtype};
    gather_rows(*plan_.kernels, to, type, rows, keys, input.width);
    if (input.scales && !is_scaled(type))
      for (std::int64_t i = 0; i < keys; ++i)
        scale_row(to + i * row, type, input.width, static_cast<double>(input.scale[index + i]));
  });
}

void KeySource::list_known(const Input& input, std::int64_t first, std::int64_t count) const {
  each_run(input.operand, input.base, first, count, [&](const char* from, std::int64_t index, std::int64_t keys) {
    const std::int64_t stride = input.operand.row;
    const void** rows = input.rows + index;
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < keys; ++i, from += stride) rows[i] = from;
  });
}

void KeySource::list(const Input& input, std::int64_t first, int count) const {
  if (input.copies) {
    const std::int64_t row = row_bytes(plan_.attend->keys, input.width);
    for (int i = 0; i < count + rows_ahead; ++i) input.rows[i] = input.copy + std::min(i, count - 1) * row;
    return;
  }
  // The rows after the block are only prefetched. They are the next keys. After the last valid key, that key is
  // repeated.
  const std::int64_t known = std::min<std::int64_t>(count + rows_ahead, end_ - first);
  list_known(input, first, known);
  for (std::int64_t i = known; i < count + rows_ahead; ++i) input.rows[i] = input.rows[known - 1];
}

// The rows of a block in the caller's memory, for a tile kernel to prefetch.
LaterRows KeySource::later(const Input& input, std::int64_t first, int count) const {
  const std::int64_t known = std::min<std::int64_t>(count, end_ - first);
  if (known <= 0 || input.operand.column != size_of(input.operand.dtype)) return {};
  list_known(input, first, known);
  return {input.rows, known, row_bytes(input.operand.dtype, input.width)};
}

void KeySource::read_scales(const Input& input, std::int64_t first, int count) const {
  each_run(input.scales, input.scale_base, first, count, [&](const char* from, std::int64_t index, std::int64_t keys) {
    char* to = reinterpret_cast<char*>(input.scale + index);
    copy_rows({to, 0, sizeof(float)}, {from, 0, input.scales.row}, 1, keys, sizeof(float));
  });
  std::fill_n(input.scale + count, rows_ahead, 0.0f);
  // Prefetches the scales of the next block. The scales of different pages are far apart in memory. Without a prefetch,
  // the thread would wait for the scales of each page.
  const std::int64_t later = std::min<std::int64_t>(count, end_ - first - count);
  each_run(input.scales, input.scale_base, first + count, later,
           [](const char* from, std::int64_t, std::int64_t) { __builtin_prefetch(from); });
}

KeySource::Rows KeySource::prepare(const Input& input, std::int64_t first, int count) const {
  if (input.scales) read_scales(input, first, count);
  if (input.copies) copy(input, first, count);
  if (plan_.attend->by_row) list(input, first, count);
  if (input.copies) return {input.copy, input.width};
  return {at(input.operand, input.base, first), input.operand.row / size_of(input.operand.dtype)};
}

KeyBlock KeySource::block(std::int64_t first, int count) const {
  const Rows keys = prepare(keys_, first, count), values = prepare(values_, first, count);
  KeyBlock block{};
  block.first = first;
  block.count = count;
  block.keys = keys.data;
  block.key_stride = keys.stride;
  block.values = values.data;
  block.value_stride = values.stride;
  if (!plan_.attend->by_row) {
    block.later_values = later(values_, values_.copies ? first + count : first, count);
    block.later_keys = later(keys_, first + count, count);
  }
  block.key_rows = keys_.rows;
  block.value_rows = values_.rows;
  const bool scaled = is_scaled(plan_.attend->keys);
  block.key_scales = scaled ? keys_.scale : nullptr;
  block.value_scales = scaled ? values_.scale : nullptr;
  return block;
}

}  // namespace selfattn
