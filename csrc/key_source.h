// Where blocks of keys and values come from. Kernels want rows of contiguous, aligned elements of their type; a source
// hands out a block in place where the memory is like that, or a copy of one block at a time where it is not.
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

}  // namespace selfattn
