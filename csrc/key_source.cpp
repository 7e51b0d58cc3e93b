#include "key_source.h"

#include <cstring>

namespace selfattn {

void copy_rows(char* to, std::int64_t to_row, std::int64_t to_column, const char* from, std::int64_t from_row,
               std::int64_t from_column, std::int64_t rows, std::int64_t count, std::int64_t size) {
  const auto bytes = static_cast<std::size_t>(size);
  for (std::int64_t r = 0; r < rows; ++r, to += to_row, from += from_row) {
    if (to_column == size && from_column == size) {
      std::memcpy(to, from, bytes * static_cast<std::size_t>(count));
    } else {
      for (std::int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_column, from + i * from_column, bytes);
    }
  }
}

StridedKeys::StridedKeys(const Problem& problem, const Plan& plan, const Slot& slot, std::int64_t batch,
                         std::int64_t kv_head)
    : problem_(problem),
      plan_(plan),
      slot_(slot),
      keys_(problem.at(problem.key, batch) + kv_head * problem.key.head),
      values_(problem.at(problem.value, batch) + kv_head * problem.value.head) {}

KeyBlock StridedKeys::block(std::int64_t first, int count) const {
  const std::int64_t size = size_of(problem_.dtype);
  const auto rows = [&](const Operand& operand, const char* base, std::int64_t width, bool copies, char* buffer,
                        std::int64_t& step) -> const void* {
    const char* from = base + first * operand.row;
    step = operand.row / size;
    if (!copies) return from;
    copy_rows(buffer, width * size, size, from, operand.row, operand.column, count, width, size);
    step = width;
    return buffer;
  };
  KeyBlock block{};
  block.first = first;
  block.count = count;
  block.keys = rows(problem_.key, keys_, problem_.head_dim, plan_.copies_keys, slot_.keys, block.key_step);
  block.values = rows(problem_.value, values_, problem_.value_dim, plan_.copies_values, slot_.values, block.value_step);
  if (!plan_.copies_keys && first + count + count <= problem_.kv_len)
    block.next_keys = static_cast<const char*>(block.keys) + count * problem_.key.row;
  return block;
}

}  // namespace selfattn
