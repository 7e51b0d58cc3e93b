// The key mass: the sum of the weights that each key receives, over the queries (Problem::key_mass).
//
// Each row task sums the weights of its own rows. The thread that finishes the last row task of a KV head adds up the
// sums of all of them, always in the same order. So results do not depend on the number of threads.
#pragma once
#include <atomic>
#include <cstdint>

#include "plan.h"

namespace selfattn {

namespace core {
struct Carver;
}

struct KeyMass {
  double* sums;                         // [batch entry][KV head][row task][head of the group][key]
  std::atomic<std::int32_t>* finished;  // number of finished row tasks of each batch entry and KV head
  std::int64_t kv_heads;                // of all batch entries; 0 if the problem has no key mass

  // The sums to which a row block adds its weights, [head of the group][key]. They are 0 for the first block of a row
  // task, which must be the first to ask. `kv_index` counts the KV heads of all batch entries.
  double* of(const Plan& plan, const Problem& problem, std::int64_t kv_index, std::int64_t row_block) const;
  // Must be called once for each row task, after the last weight was added.
  void finish(const Plan& plan, const Problem& problem, std::int64_t kv_index) const;
};

KeyMass take_key_mass(core::Carver& carver, const Plan& plan, const Problem& problem);

}  // namespace selfattn
