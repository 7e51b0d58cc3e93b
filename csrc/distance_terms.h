// What rows add to their scores by the distance of query and key, made for one block of keys at a time: nothing of the
// size of all scores exists, and nothing is shifted.
#pragma once
#include <cstdint>

#include "row_block.h"

namespace selfattn {

class DistanceTerms {
 public:
  DistanceTerms(const Problem& problem, const Plan& plan, const RowSpan& span, const Slot& slot);

  // Points the slot's rows at what they add to the keys [first, first + count). Blocks come in order, up to `end`.
  void prepare(std::int64_t first, int count, std::int64_t end);

 private:
  void multiply(std::int64_t first, std::int64_t count);
  template <class T>
  void fill_biases(std::int64_t first, int count) const;
  template <class T>
  void add_biases(std::int64_t first, int count) const;

  const Problem& problem_;
  const Plan& plan_;
  const RowSpan& span_;
  const Slot& slot_;
  const std::int64_t offset_;
  std::int64_t made_ = -1;  // the end of the keys that relative products are there for
};

}  // namespace selfattn
