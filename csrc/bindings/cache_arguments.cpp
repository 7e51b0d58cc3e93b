#include "bindings/cache_arguments.h"

#include <algorithm>
#include <atomic>

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

}  // namespace

CacheArguments::CacheArguments(const char* function, const py::tuple& values, std::int64_t more)
    : more_(more), slots_(values[5].cast<std::int64_t>()) {
  const bool paged = !values[6].is_none();
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

void CacheArguments::open_batch(const char* function, const py::tuple& values) {
  cache_.batch = key_.shape[0];
  active_ = integers_at(values, 7);
  state_ = integers_at(values, 8);
  const std::int64_t* current =
      state_ + (std::atomic_ref(*active_).load(std::memory_order_acquire) & 1) * 2 * cache_.batch;
  cache_.lengths = current;
  const auto window = values[9].cast<std::int64_t>();
  // The buffer may be another's as well.
  constexpr std::int64_t longest = std::int64_t{1} << 61;
  for (std::int64_t b = 0; b < cache_.batch; ++b) {
    const std::int64_t length = current[b], start = current[cache_.batch + b];
    if (length < 0 || length > (window < 0 ? slots_ : longest) || start < 0 || start > length)
      refuse(function, "the cache's buffer says that sequence ", b, " has the tokens ", start, " to ", length,
             ", which is impossible");
  }
  if (window >= 0) return open_ring(function, window);
  for (std::int64_t b = 0; b < cache_.batch; ++b)
    if (current[b] > slots_ - more_)
      refuse(function, "sequence ", b, " holds ", current[b], " tokens, so that ", more_, " more exceed the capacity ",
             slots_);
}

void CacheArguments::open_ring(const char* function, std::int64_t window) {
  if (more_ > slots_ - window)
    refuse(function, more_, " tokens at once, but a ring of ", slots_, " slots with a window of ", window,
           " takes at most ", slots_ - window);
  cache_.pages.size = slots_;
  starts_.resize(static_cast<std::size_t>(cache_.batch));
  const std::int64_t* starts = cache_.lengths + cache_.batch;
  for (std::int64_t b = 0; b < cache_.batch; ++b)
    starts_[static_cast<std::size_t>(b)] = std::max(starts[b], cache_.lengths[b] + more_ - slots_);
  starts_shape_[0] = cache_.batch;
  cache_.starts = {starts_.data(), DType::i64, 1, starts_shape_, starts_strides_};
}

void CacheArguments::open_pages(const char* function, const py::tuple& values) {
  const py::array table = array_at(values, 6);
  Pages& pages = cache_.pages;
  pages = {slots_, static_cast<const std::int32_t*>(table.data()), table.shape(1), integers_at(values, 7)};
  cache_.batch = array_at(values, 8).shape(0);
  cache_.lengths = integers_at(values, 8);
  cache_.starts = optional_view(values[9], DType::i64);
  const std::int64_t num_pages = key_.shape[0];
  const auto* starts = static_cast<const std::int64_t*>(cache_.starts.data);
  for (std::int64_t b = 0; b < cache_.batch; ++b) {
    const std::int64_t first = starts ? starts[b] / pages.size : 0;
    const std::int64_t end = (cache_.lengths[b] + more_ + pages.size - 1) / pages.size;
    if (end > pages.table_step) refuse(function, "the page table of sequence ", b, " is too short for its length");
    const std::int32_t* own = pages.of(b);
    const bool inside =
        std::all_of(own + first, own + std::max(first, end), [&](std::int32_t p) { return p >= 0 && p < num_pages; });
    if (!inside) refuse(function, "the page table of sequence ", b, " holds a page outside 0..", num_pages - 1);
  }
}

void CacheArguments::claim() const {
  if (more_ != 0 && !starts_.empty()) publish(0);
}

void CacheArguments::commit() const {
  if (active_ && more_ != 0) publish(more_);
}

// The copy that is not in force is written first; then one store of 8 bytes puts it in force.
void CacheArguments::publish(std::int64_t more) const {
  const std::int64_t current = std::atomic_ref(*active_).load(std::memory_order_relaxed) & 1;
  const std::int64_t* from = state_ + current * 2 * cache_.batch;
  std::int64_t* to = state_ + (1 - current) * 2 * cache_.batch;
  for (std::int64_t b = 0; b < cache_.batch; ++b) {
    to[b] = from[b] + more;
    to[cache_.batch + b] = starts_.empty() ? 0 : starts_[static_cast<std::size_t>(b)];
  }
  std::atomic_ref(*active_).store(1 - current, std::memory_order_release);
}

}  // namespace selfattn::bindings
