// The keys and values of a case as caches hold them: in pages in any order, in rings, or as codes with scales. A run is
// the keys of one head in one page; without pages, in one sequence. An inaccessible page of memory follows every run.
// Slots without a key hold NaN.
#pragma once
#include <optional>

#include "attend_case.h"
#include "guarded_memory.h"

namespace selfattn::native {

struct Store {
  std::int64_t page_size = 0;    // 0: no pages
  bool ring = false;             // each sequence is a ring that has room only for the keys it holds
  std::optional<DType> codes{};  // the type of the codes, if the cache holds codes
  std::uint64_t seed = 1;        // for the order of the pages
};

// Whether a cache could hold the keys and values: they have four axes, in either layout, and an entry for each batch
// entry of the call.
bool cacheable(const Case& c);

// Rounds the rows of an array to codes of a type. Returns the exact numbers that these codes represent.
Array coded(const Array& from, DType codes);

class CachedCase {
 public:
  CachedCase(const Case& c, const Store& store);  // the case must be cacheable and outlive this object
  CachedCase(const CachedCase&) = delete;         // views point to members
  CachedCase& operator=(const CachedCase&) = delete;

  AttentionArguments arguments() const;

 private:
  // Keys or values, and the scales of their codes.
  struct Side {
    std::int64_t width = 0;
    std::optional<test::GuardedMemory> rows{}, scales{};
    std::int64_t shape[4] = {}, strides[4] = {}, scale_shape[3] = {}, scale_strides[3] = {};
  };

  bool paged() const { return store_.page_size > 0; }
  std::int64_t end_of(std::int64_t sequence) const;
  std::int64_t start_of(std::int64_t sequence) const;
  std::int32_t* entries_of(std::int64_t sequence) const;
  void give_pages();
  void fill(Side& side, const Array& from);
  void write_row(const Side& side, const Array& from, std::int64_t position, std::int64_t place) const;
  void describe(Side& side) const;

  const Case& case_;
  const Store store_;
  const std::int64_t batch_, heads_, length_;
  const DType dtype_;
  std::int64_t slots_ = 0;   // slots of a run
  std::int64_t runs_ = 1;    // of a sequence
  std::int64_t places_ = 0;  // runs of each head for which there is memory
  std::optional<test::GuardedMemory> table_;
  std::vector<Pages::Table> tables_;
  Side key_, value_;
};

}  // namespace selfattn::native
