#include "bindings/cache_arguments.h"

#include <algorithm>

#include "message.h"

namespace selfattn::bindings {
namespace {

py::array array_at(const py::tuple& values, std::size_t i) { return py::reinterpret_borrow<py::array>(values[i]); }

const std::int64_t* integers_at(const py::tuple& values, std::size_t i) {
  return static_cast<const std::int64_t*>(array_at(values, i).data());
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

CacheArguments::CacheArguments(const char* function, const py::tuple& values, std::int64_t more) {
  const bool paged = !values[6].is_none();
  cache_.dtype = static_cast<DType>(values[4].cast<int>());
  cache_.batch = array_at(values, 8).shape(0);
  cache_.num_kv_heads = array_at(values, 0).shape(1);
  cache_.key = side_of(values, 0, 2, paged);
  cache_.value = side_of(values, 1, 3, paged);
  cache_.pages.size = values[5].cast<std::int64_t>();
  cache_.lengths = integers_at(values, 8);
  cache_.starts = optional_view(values[9], DType::i64);
  key_ = view_of(array_at(values, 0), cache_.dtype);
  value_ = view_of(array_at(values, 1), cache_.dtype);
  if (!paged) return;
  const py::array table = array_at(values, 6);
  cache_.pages.table = static_cast<const std::int32_t*>(table.data());
  cache_.pages.table_step = table.shape(1);
  cache_.pages.rows = integers_at(values, 7);
  check_pages(function, array_at(values, 0).shape(0), more);
}

void CacheArguments::check_pages(const char* function, std::int64_t num_pages, std::int64_t more) const {
  const Pages& pages = cache_.pages;
  for (std::int64_t b = 0; b < cache_.batch; ++b) {
    const std::int64_t* starts = static_cast<const std::int64_t*>(cache_.starts.data);
    const std::int64_t first = starts ? starts[b] / pages.size : 0;
    const std::int64_t end = (cache_.lengths[b] + more + pages.size - 1) / pages.size;
    if (end > pages.table_step) refuse(function, "the page table of sequence ", b, " is too short for its length");
    const std::int32_t* own = pages.of(b);
    const bool inside =
        std::all_of(own + first, own + std::max(first, end), [&](std::int32_t p) { return p >= 0 && p < num_pages; });
    if (!inside) refuse(function, "the page table of sequence ", b, " holds a page outside 0..", num_pages - 1);
  }
}

}  // namespace selfattn::bindings
