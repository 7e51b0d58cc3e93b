// What Python's caches hand over of themselves.
#pragma once
#include "bindings/arrays.h"
#include "cache.h"

namespace selfattn::bindings {

// (k, v, k_scales or None, v_scales or None, dtype, page_size or 0, table or None, rows, lengths, starts or None):
// arrays that the cache made and keeps. With a table k is (pages, heads, page_size, dim), else (batch, heads, capacity,
// dim), a ring where there is a page_size.
class CacheArguments {
 public:
  // Refuses a page outside the store among those of the first lengths + `more` tokens.
  CacheArguments(const char* function, const py::tuple& values, std::int64_t more);
  const Cache& cache() const { return cache_; }
  bool meets(const TensorView& view) const { return meet(view, key_) || meet(view, value_); }

 private:
  void check_pages(const char* function, std::int64_t num_pages, std::int64_t more) const;

  Cache cache_{};
  TensorView key_, value_;  // the whole stores
};

std::optional<Rope> rope_of(py::handle description);

void register_cache(py::module_& module);

}  // namespace selfattn::bindings
