// How the scratch of one call is divided. Plan counts with these, attend carves with them: one description for both.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace selfattn {

// One thread's memory.
struct Slot {
  Row* rows;
  char* row_max;
  char* row_sum;
  char* kernel_scratch;
  char* queries;  // bounce buffers, where an operand cannot be used in place
  char* keys;
  char* values;
  char* out;
  const void** key_rows;  // for kernels that take rows wherever they stand
  const void** value_rows;
  float* key_scales;  // of codes
  float* value_scales;
  std::uint8_t* masks;  // of the newest keys, [row][mask_step]
  std::int64_t mask_step;
  // Of terms by distance: queries for the relative product, vectors and their panel, products [row][relative_step].
  char* relative_queries;
  const void** relative_rows;
  char* relative_copies;
  char* relative_panel;
  char* relative;
  std::int64_t relative_step;
  char* biases;  // a line for each head of the group, or for each row
  std::int64_t bias_step;
  std::size_t bytes;

  Slot(char* base, const Plan& plan, const Problem& problem);
};

// Results of one key range of one row block, before they are merged.
struct Partial {
  char* out;
  char* row_max;
  char* row_sum;
};

struct Shared {
  std::int64_t row_blocks;              // of all batch entries and KV heads
  std::atomic<std::int32_t>* finished;  // ranges done, per row block
  char* partials;
  std::size_t partial_bytes;  // of one range of one row block
  std::size_t bytes;

  Shared(char* base, const Plan& plan, const Problem& problem);
  Partial partial(const Plan& plan, const Problem& problem, std::int64_t block, std::int64_t range) const;
};

}  // namespace selfattn
