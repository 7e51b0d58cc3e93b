// Score terms that depend on the distance between query and key: relative products and distance biases. They are
// computed for some keys at a time, so no array of the size of all scores exists, and rows are never shifted in memory.
#pragma once
#include <cstdint>

#include "row_block.h"

namespace selfattn {

class DistanceTerms {
 public:
  DistanceTerms(const Problem& problem, const Plan& plan, const RowSpan& span, const Slot& slot);

  // Points the slot's rows to their terms for the keys [first, first + count). Blocks must come in order; `end` is the
  // end of the last one.
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
  std::int64_t made_ = -1;  // end of the keys whose relative products are computed
};

}  // namespace selfattn
