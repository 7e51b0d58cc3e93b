// Where blocks of keys and values come from. Kernels want rows of contiguous, aligned elements; a source hands out a
// block in place where the memory is like that, or a copy of one block at a time where it is not.
#pragma once
#include "plan.h"
#include "slot.h"

namespace selfattn {

// Strided arrays, for one KV head of one batch entry.
class StridedKeys {
 public:
  StridedKeys(const Problem& problem, const Plan& plan, const Slot& slot, std::int64_t batch, std::int64_t kv_head);
  KeyBlock block(std::int64_t first, int count) const;

 private:
  const Problem& problem_;
  const Plan& plan_;
  const Slot& slot_;
  const char* keys_;
  const char* values_;
};

// Copies `rows` rows of `count` elements of `size` bytes between any two strides.
void copy_rows(char* to, std::int64_t to_row, std::int64_t to_column, const char* from, std::int64_t from_row,
               std::int64_t from_column, std::int64_t rows, std::int64_t count, std::int64_t size);

}  // namespace selfattn
