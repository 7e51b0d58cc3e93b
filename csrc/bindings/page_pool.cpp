// The pages of a PagedKVCache. Each change is one call, which no interrupt can divide.
#include "page_pool.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/cache_arguments.h"

namespace selfattn::bindings {
namespace {

using PageNumbers = py::array_t<std::int32_t>;

PagePool& pool_in(py::handle capsule) { return held_by<HeldPool>(capsule).pool; }

py::capsule make_page_pool(std::int64_t num_pages, std::int64_t page_size, std::int64_t next_id) {
  return capsule_of(std::make_unique<HeldPool>(HeldPool{PagePool(num_pages, page_size, next_id)}));
}

std::int64_t add_sequence(py::handle pool) { return pool_in(pool).add(); }

std::int64_t fork_sequence(py::handle pool, py::handle id) { return pool_in(pool).fork("fork", id_of("fork", id)); }

void truncate_sequence(py::handle pool, py::handle id, std::int64_t length, std::int64_t window) {
  pool_in(pool).truncate("truncate", id_of("truncate", id), length, window);
}

void free_sequence(py::handle pool, py::handle id) { pool_in(pool).remove("free", id_of("free", id)); }

bool put_sequence(py::handle pool, std::int64_t id, std::int64_t length, std::int64_t start, const PageNumbers& pages) {
  return pool_in(pool).put(id, {{pages.data(), pages.data() + pages.size()}, start, length});
}

void recount_pages(py::handle pool) { pool_in(pool).recount(); }

std::int64_t length_of(py::handle pool, py::handle id) {
  return pool_in(pool).row("length", id_of("length", id)).length;
}

py::tuple sequence(py::handle pool, py::handle id) {
  PagePool& pages = pool_in(pool);
  const PagePool::Row& row = pages.row("sequence", id_of("sequence", id));
  return py::make_tuple(row.length, row.start, PageNumbers(pages.count(row), row.pages.data()));
}

// The leading pages that all sequences of a step share, and the length of each sequence.
py::tuple common_pages(const char* function, py::handle object) {
  const Step& step = Record<Step>::in(object);
  PagePool& pool = pool_in(step.sequences);
  std::vector<std::int32_t> shared;
  std::vector<std::int64_t> lengths;
  for (const py::handle id : py::reinterpret_borrow<py::list>(step.ids)) {
    const PagePool::Row& row = pool.row(function, id_of(function, id));
    const auto held = row.pages.begin() + (row.start == 0 ? pool.count(row) : 0);
    if (lengths.empty()) shared.assign(row.pages.begin(), held);
    shared.erase(std::mismatch(shared.begin(), shared.end(), row.pages.begin(), held).first, shared.end());
    lengths.push_back(row.length);
  }
  return py::make_tuple(PageNumbers(static_cast<py::ssize_t>(shared.size()), shared.data()),
                        py::array_t<std::int64_t>(static_cast<py::ssize_t>(lengths.size()), lengths.data()));
}

py::tuple live_sequences(py::handle pool) {
  const PagePool::Rows& rows = pool_in(pool).rows();
  py::tuple ids(rows.size());
  std::size_t i = 0;
  for (const auto& [id, row] : rows) ids[i++] = id;
  return ids;
}

std::int64_t next_id(py::handle pool) { return pool_in(pool).next_id(); }

std::size_t num_free_pages(py::handle pool) { return pool_in(pool).free_pages().size(); }

}  // namespace

void register_pages(py::module_& module) {
  module.def("make_page_pool", &make_page_pool);
  module.def("add_sequence", &add_sequence);
  module.def("fork_sequence", &fork_sequence);
  module.def("truncate_sequence", &truncate_sequence);
  module.def("free_sequence", &free_sequence);
  module.def("put_sequence", &put_sequence);
  module.def("recount_pages", &recount_pages);
  module.def("length_of", &length_of);
  module.def("sequence", &sequence);
  module.def("common_pages", &common_pages);
  module.def("live_sequences", &live_sequences);
  module.def("next_id", &next_id);
  module.def("num_free_pages", &num_free_pages);
}

}  // namespace selfattn::bindings
