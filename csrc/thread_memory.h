// The layout of the scratch memory of a call. make_plan computes sizes with it, and attend() divides memory with it, so
// that the two always agree.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "distance_terms.h"
#include "key_mass.h"
#include "plan.h"

namespace selfattn {

// One thread's memory.
struct ThreadMemory {
  Row* rows;
  char* row_max;
  char* row_sum;
  char* kernel_scratch;
  char* queries;  // bounce buffers for operands that cannot be used in place
  char* keys;
  char* values;
  char* out;
  const void** key_rows;  // for kernels that take a pointer to each row
  const void** value_rows;
  float* key_scales;  // of codes
  float* value_scales;
  std::uint8_t* masks;  // masks over the newest keys, expanded to a key block: [row][mask_stride]
  std::int64_t mask_stride;
  DistanceMemory distance;
  char* scores;  // if the plan keeps scores: [row][kv_len]
  double* mass;  // the sums to which the weights of the rows are added: see KeyMass::of; set for each task
  std::size_t bytes;

  ThreadMemory(char* base, const Plan& plan, const Problem& problem);
};

// Results of one key range of one row block, before they are merged.
struct Partial {
  char* out;
  char* row_max;
  char* row_sum;
  std::size_t bytes;

  Partial(char* base, const Plan& plan, const Problem& problem);
};

struct Shared {
  std::int64_t row_blocks;              // of all batch entries and KV heads; 0 if keys are not split into ranges
  std::atomic<std::int32_t>* finished;  // number of finished ranges of each row block
  char* scores;                         // if the plan keeps scores: [row block][row][kv_len]
  KeyMass mass;
  char* partials;
  std::size_t partial_bytes;  // of one range of one row block
  std::size_t bytes;

  Shared(char* base, const Plan& plan, const Problem& problem);
  Partial partial(const Plan& plan, const Problem& problem, std::int64_t block, std::int64_t range) const;
  char* scores_of(const Plan& plan, const Problem& problem, std::int64_t block) const;
};

}  // namespace selfattn
