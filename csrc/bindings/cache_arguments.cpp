#include "bindings/cache_arguments.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "message.h"

namespace selfattn::bindings {
namespace {

py::array array_at(const py::tuple& values, std::size_t i) { return py::reinterpret_borrow<py::array>(values[i]); }

std::int64_t* integers_at(const py::tuple& values, std::size_t i) {
  return static_cast<std::int64_t*>(const_cast<void*>(array_at(values, i).data()));
}

TokenRows rows_of(py::handle object, bool paged) {
  if (object.is_none()) return {};
  const py::array store = py::reinterpret_borrow<py::array>(object);
  TokenRows rows;
  rows.data = static_cast<char*>(const_cast<void*>(store.data()));
  (paged ? rows.page : rows.batch) = store.strides(0);
  rows.head = store.strides(1);
  rows.row = store.strides(2);
  return rows;
}

Cache::Side side_of(const py::tuple& values, std::size_t store, std::size_t scales, bool paged) {
  return {rows_of(values[store], paged), rows_of(values[scales], paged), array_at(values, store).shape(3)};
}

std::int64_t batch_of(const py::tuple& values) {
  return values[6].is_none() ? array_at(values, 0).shape(0) : static_cast<std::int64_t>(py::len(values[6]));
}

std::size_t memory_bytes(std::int64_t batch) {
  return static_cast<std::size_t>(bytes_of(batch, 2 * sizeof(std::int64_t) + sizeof(Pages::Row)));
}

// Each number is read once: a compiler may not go back to memory that another process writes to.
void copy_shared(std::int64_t* to, std::int64_t* from, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = std::atomic_ref(from[i]).load(std::memory_order_relaxed);
}

}  // namespace

CacheArguments::CacheArguments(const char* function, const py::tuple& values, std::int64_t more)
    : more_(more), slots_(values[5].cast<std::int64_t>()), memory_(memory_bytes(batch_of(values))) {
  const bool paged = !values[6].is_none();
  cache_.batch = batch_of(values);
  const auto batch = static_cast<std::size_t>(cache_.batch);
  lengths_ = reinterpret_cast<std::int64_t*>(memory_.data());
  starts_ = lengths_ + batch;
  rows_ = reinterpret_cast<Pages::Row*>(starts_ + batch);
  cache_.lengths = lengths_;
  cache_.dtype = static_cast<DType>(values[4].cast<int>());
  cache_.num_kv_heads = array_at(values, 0).shape(1);
  cache_.key = side_of(values, 0, 2, paged);
  cache_.value = side_of(values, 1, 3, paged);
  key_ = view_of(array_at(values, 0), cache_.dtype);
  value_ = view_of(array_at(values, 1), cache_.dtype);
  if (paged)
    open_pages(function, values);
  else
    open_batch(function, values);
}

void CacheArguments::use_starts() {
  starts_shape_[0] = cache_.batch;
  cache_.starts = {starts_, DType::i64, 1, starts_shape_, starts_strides_};
}

void CacheArguments::open_batch(const char* function, const py::tuple& values) {
  active_ = integers_at(values, 7);
  state_ = integers_at(values, 8);
  const std::int64_t current = std::atomic_ref(*active_).load(std::memory_order_acquire) & 1;
  copy_shared(lengths_, state_ + current * 2 * cache_.batch, 2 * cache_.batch);
  const auto window = values[9].cast<std::int64_t>();
  constexpr std::int64_t longest = std::int64_t{1} << 61;
  for (std::int64_t b = 0; b < cache_.batch; ++b)
    if (lengths_[b] < 0 || lengths_[b] > (window < 0 ? slots_ : longest) || starts_[b] < 0 || starts_[b] > lengths_[b])
      refuse(function, "the cache's buffer says that sequence ", b, " has the tokens ", starts_[b], " to ", lengths_[b],
             ", which is impossible");
  if (window >= 0) return open_ring(function, window);
  for (std::int64_t b = 0; b < cache_.batch; ++b)
    if (lengths_[b] > slots_ - more_)
      refuse(function, "sequence ", b, " holds ", lengths_[b], " tokens, so that ", more_, " more exceed the capacity ",
             slots_);
}

void CacheArguments::open_ring(const char* function, std::int64_t window) {
  if (more_ > slots_ - window)
    refuse(function, more_, " tokens at once, but a ring of ", slots_, " slots with a window of ", window,
           " takes at most ", slots_ - window);
  ring_ = true;
  cache_.pages.size = slots_;
  for (std::int64_t b = 0; b < cache_.batch; ++b) starts_[b] = std::max(starts_[b], lengths_[b] + more_ - slots_);
  use_starts();
}

void CacheArguments::open_pages(const char* function, const py::tuple& values) {
  cache_.pages = {slots_, rows_};
  std::copy_n(integers_at(values, 7), cache_.batch, lengths_);
  const bool starts = !values[8].is_none();
  if (starts) {
    std::copy_n(integers_at(values, 8), cache_.batch, starts_);
    use_starts();
  }
  const std::int64_t* firsts = values[9].is_none() ? nullptr : integers_at(values, 9);
  const py::list pages = py::reinterpret_borrow<py::list>(values[6]);
  for (std::int64_t b = 0; b < cache_.batch; ++b) {
    const std::int64_t start = starts ? starts_[b] : 0;
    if (start < 0 || start > lengths_[b])
      refuse(function, "sequence ", b, " has the tokens ", start, " to ", lengths_[b], ", which is impossible");
    open_row(function, b, pages[static_cast<std::size_t>(b)], firsts ? firsts[b] : 0);
  }
}

// Checks the pages of a sequence from the one of its first token on: no others are read.
void CacheArguments::open_row(const char* function, std::int64_t b, py::handle numbers, std::int64_t first) {
  static const std::int32_t nothing = 0;
  Py_buffer buffer;
  if (PyObject_GetBuffer(numbers.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  // The cache's lock keeps the numbers in place; a buffer that is held could not grow in a child forked meanwhile.
  PyBuffer_Release(&buffer);
  const std::int64_t begin = (cache_.starts ? starts_[b] : 0) / slots_;
  const std::int64_t end = (lengths_[b] + more_ + slots_ - 1) / slots_;
  const std::int64_t count = buffer.len / static_cast<std::int64_t>(sizeof(std::int32_t));
  if (begin < first || end - first > count) refuse(function, "the pages of sequence ", b, " do not fit its length");
  const auto* own = static_cast<const std::int32_t*>(buffer.buf) + (begin - first);
  rows_[b] = {begin < end ? own : &nothing, begin};
  const std::int64_t num_pages = key_.shape[0];
  const bool inside =
      begin >= end || std::all_of(own, own + (end - begin), [&](std::int32_t p) { return p >= 0 && p < num_pages; });
  if (!inside) refuse(function, "the pages of sequence ", b, " hold a number outside 0..", num_pages - 1);
}

void CacheArguments::claim() const {
  if (more_ != 0 && ring_) publish(0);
}

void CacheArguments::commit() const {
  if (active_ && more_ != 0) publish(more_);
}

void CacheArguments::reorder(const std::int64_t* index) const {
  std::int64_t used = 0;
  for (std::int64_t b = 0; b < cache_.batch; ++b) used = std::max(used, std::min(lengths_[b], slots_));
  const TokenRows* const sides[] = {&cache_.key.tokens, &cache_.value.tokens, &cache_.key.scales, &cache_.value.scales};
  std::int64_t most = 0;
  for (const TokenRows* rows : sides) most = std::max(most, used * rows->row);
  const Scratch copy(static_cast<std::size_t>(bytes_of(cache_.batch, most)));  // of one head
  const CoreCall call_of_core(static_cast<double>(cache_.batch * cache_.num_kv_heads * most));
  for (const TokenRows* rows : sides)
    for (std::int64_t head = 0; rows->data && used > 0 && head < cache_.num_kv_heads; ++head) {
      const auto bytes = static_cast<std::size_t>(used * rows->row);
      const auto at = [&](std::int64_t b) { return rows->data + b * rows->batch + head * rows->head; };
      const auto kept = [&](std::int64_t b) { return copy.data() + b * most; };
      for (std::int64_t b = 0; b < cache_.batch; ++b)
        if (index[b] != b) std::memcpy(kept(b), at(index[b]), bytes);
      for (std::int64_t b = 0; b < cache_.batch; ++b)
        if (index[b] != b) std::memcpy(at(b), kept(b), bytes);
    }
  publish(0, index);
}

// The copy that is not in force is written first; then one store of 8 bytes puts it in force.
void CacheArguments::publish(std::int64_t more, const std::int64_t* index) const {
  const std::int64_t current = std::atomic_ref(*active_).load(std::memory_order_relaxed) & 1;
  std::int64_t* to = state_ + (1 - current) * 2 * cache_.batch;
  for (std::int64_t b = 0; b < cache_.batch; ++b) {
    const std::int64_t from = index ? index[b] : b;
    to[b] = lengths_[from] + more;
    to[cache_.batch + b] = ring_ ? starts_[from] : 0;
  }
  std::atomic_ref(*active_).store(1 - current, std::memory_order_release);
}

}  // namespace selfattn::bindings
