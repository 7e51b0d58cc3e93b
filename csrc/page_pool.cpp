#include "page_pool.h"

#include <algorithm>

#include "arithmetic.h"
#include "cache.h"
#include "message.h"

namespace selfattn {

PagePool::PagePool(std::int64_t num_pages, std::int64_t page_size, std::int64_t next_id)
    : page_size_(page_size), next_id_(next_id), sharers_(static_cast<std::size_t>(num_pages)) {
  free_pages_.reserve(sharers_.size());
  recount();
}

std::int64_t PagePool::runs(std::int64_t length) const { return ceil_div(length, page_size_); }

std::int64_t PagePool::count(const Row& row) const { return runs(row.length) - row.start / page_size_; }

PagePool::Row& PagePool::row(const char* function, std::int64_t id) {
  const auto found = rows_.find(id);
  if (found == rows_.end()) refuse(function, "sequence"_arg, " ", id, " is not live");
  return found->second;
}

std::int64_t PagePool::add() {
  rows_.try_emplace(next_id_);
  return next_id_++;
}

std::int64_t PagePool::fork(const char* function, std::int64_t id) {
  const Row& from = row(function, id);
  rows_.insert_or_assign(next_id_,
                         Row{{from.pages.begin(), from.pages.begin() + count(from)}, from.start, from.length});
  for (const std::int32_t page : rows_.at(next_id_).pages) hold(page);
  return next_id_++;
}

void PagePool::truncate(const char* function, std::int64_t id, std::int64_t length, std::int64_t window) {
  Row& cut = row(function, id);
  check_cut(function, "length"_arg, " is ", {id, cut.start, cut.length, length}, window);
  const std::int64_t held = count(cut);
  if (length == 0) cut.start = 0;
  cut.length = length;
  const auto kept = static_cast<std::size_t>(count(cut));
  std::for_each(cut.pages.begin() + static_cast<std::ptrdiff_t>(kept), cut.pages.begin() + held,
                [this](std::int32_t page) { release(page); });
  cut.pages.resize(kept);
  if (cut.pages.capacity() > 4 * kept) cut.pages.shrink_to_fit();
}

void PagePool::remove(const char* function, std::int64_t id) {
  const Row& gone = row(function, id);
  std::for_each(gone.pages.begin(), gone.pages.begin() + count(gone), [this](std::int32_t page) { release(page); });
  rows_.erase(id);
}

bool PagePool::put(std::int64_t id, const Row& row) {
  if (id < 0 || row.start < 0 || row.start > row.length || row.start % page_size_ != 0) return false;
  if (count(row) != static_cast<std::int64_t>(row.pages.size())) return false;
  std::vector<std::int32_t> sorted = row.pages;
  std::sort(sorted.begin(), sorted.end());
  const bool inside =
      sorted.empty() || (sorted.front() >= 0 && static_cast<std::size_t>(sorted.back()) < sharers_.size());
  if (!inside || std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return false;
  return rows_.try_emplace(id, row).second;
}

void PagePool::release(std::int32_t page) {
  if (--sharers_[static_cast<std::size_t>(page)] == 0) free_pages_.push_back(page);
}

void PagePool::recount() {
  std::fill(sharers_.begin(), sharers_.end(), 0);
  for (const auto& [id, row] : rows_)
    std::for_each(row.pages.begin(), row.pages.begin() + count(row), [this](std::int32_t page) { hold(page); });
  free_pages_.clear();
  for (std::size_t page = sharers_.size(); page-- > 0;)
    if (sharers_[page] == 0) free_pages_.push_back(static_cast<std::int32_t>(page));
}

}  // namespace selfattn
