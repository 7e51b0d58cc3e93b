// What Python's caches hand over of themselves.
#pragma once
#include <vector>

#include "bindings/arrays.h"
#include "cache.h"

namespace selfattn::bindings {

// The tuple of a cache: arrays that it made and keeps.
//   (k, v, k_scales or None, v_scales or None, dtype, slots, None, active, state, window or -1)
// of a KVCache, whose k is (batch, heads, slots, dim): `state` holds two copies of (lengths, starts), `active` says
// which is in force. With a window the slots are a ring.
//   (k, v, k_scales or None, v_scales or None, dtype, slots, table, rows, lengths, starts or None)
// of a PagedKVCache, whose k is (pages, heads, slots, dim): the table's `rows` are those of the call's sequences.
class CacheArguments {
 public:
  // For a call that appends `more` tokens to each sequence. Refuses what there is no room for, and pages outside the
  // store.
  CacheArguments(const char* function, const py::tuple& values, std::int64_t more);
  CacheArguments(const CacheArguments&) = delete;  // views point to its own members
  CacheArguments& operator=(const CacheArguments&) = delete;
  const Cache& cache() const { return cache_; }
  bool meets(const TensorView& view) const { return meet(view, key_) || meet(view, value_); }
  // Of a ring, before anything is written: the tokens that will be overwritten are gone from now on.
  void claim() const;
  // Of a KVCache: puts the new lengths in force, in one store of 8 bytes.
  void commit() const;

 private:
  void open_batch(const char* function, const py::tuple& values);
  void open_ring(const char* function, std::int64_t window);
  void open_pages(const char* function, const py::tuple& values);
  void publish(std::int64_t more) const;

  const std::int64_t more_;
  Cache cache_{};
  std::int64_t slots_;
  TensorView key_, value_;  // the whole stores
  std::int64_t *active_ = nullptr, *state_ = nullptr;
  std::vector<std::int64_t> starts_;  // of a ring, after the call
  std::int64_t starts_shape_[1], starts_strides_[1] = {sizeof(std::int64_t)};
};

std::optional<Rope> rope_of(py::handle description);

void register_cache(py::module_& module);

}  // namespace selfattn::bindings
