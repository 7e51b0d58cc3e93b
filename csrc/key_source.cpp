#include "key_source.h"

#include "rows.h"

namespace selfattn {

StridedKeys::StridedKeys(const Problem& problem, const Plan& plan, const Slot& slot, std::int64_t batch,
                         std::int64_t kv_head)
    : problem_(problem),
      plan_(plan),
      slot_(slot),
      keys_(problem.at(problem.key, batch) + kv_head * problem.key.head),
      values_(problem.at(problem.value, batch) + kv_head * problem.value.head) {}

KeyBlock StridedKeys::block(std::int64_t first, int count) const {
  const auto rows = [&](const Operand& operand, const char* base, std::int64_t width, bool copies, char* buffer,
                        std::int64_t& step) -> const void* {
    const char* from = base + first * operand.row;
    step = operand.row / size_of(operand.dtype);
    if (!copies) return from;
    gather_rows(*plan_.kernels, buffer, plan_.attend->keys, from, operand.dtype, operand.row, operand.column, count,
                width);
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
