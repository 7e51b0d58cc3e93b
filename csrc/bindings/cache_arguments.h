// What Python's caches hand over of themselves.
#pragma once
#include "bindings/arrays.h"
#include "cache.h"
#include "scratch_pool.h"

namespace selfattn::bindings {

// The tuple of a cache: arrays that it made and keeps.
//   (k, v, k_scales or None, v_scales or None, dtype, slots, None, active, state, window or -1)
// of a KVCache, whose k is (batch, heads, slots, dim): `state` holds two copies of (lengths, starts), `active` says
// which is in force. With a window the slots are a ring.
//   (k, v, k_scales or None, v_scales or None, dtype, slots, pages, lengths, starts or None, firsts or None)
// of a PagedKVCache, whose k is (pages, heads, slots, dim): `pages` holds a buffer of int32 page numbers for each
// sequence of the call, which begins with the sequence's page number firsts[b] (None: 0). It must stay as it is.
// Lengths may be in memory that others write to: they are copied once, and the copy is checked and used.
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
  // Of a KVCache: lets sequence b go on as sequence index[b] was.
  void reorder(const std::int64_t* index) const;

 private:
  void open_batch(const char* function, const py::tuple& values);
  void open_ring(const char* function, std::int64_t window);
  void open_pages(const char* function, const py::tuple& values);
  void open_row(const char* function, std::int64_t sequence, py::handle numbers, std::int64_t first);
  void use_starts();
  void publish(std::int64_t more, const std::int64_t* index = nullptr) const;

  const std::int64_t more_, slots_;
  Cache cache_{};
  TensorView key_, value_;  // the whole stores
  std::int64_t *active_ = nullptr, *state_ = nullptr;
  const Scratch memory_;   // of the following arrays
  std::int64_t* lengths_;  // before the call
  std::int64_t* starts_;   // of a ring, after the call
  Pages::Row* rows_;       // of pages
  bool ring_ = false;
  std::int64_t starts_shape_[1], starts_strides_[1] = {sizeof(std::int64_t)};
};

std::optional<Rope> rope_of(py::handle description);

void register_cache(py::module_& module);

}  // namespace selfattn::bindings
