#include "page_growth.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "message.h"

namespace selfattn {

void PageGrowth::begin(const Call& call) {
  clear();
  tokens_ = call.tokens;
  find_rows(call);
  if (call.tokens != 0) plan(call);
  const std::int32_t* fresh = gained_.data();
  sequences_.reserve(rows_.size());
  for (std::size_t b = 0; b < rows_.size(); ++b) extend(b, fresh);
  for (const Copy& copy : copies_) lost_.push_back(copy.from);
}

void PageGrowth::clear() {
  sequences_.clear();
  kept_.clear();
  rows_.clear();
  skipped_.clear();
  copied_.clear();
  taken_ = 0;
  for (auto* pages : {&gained_, &lost_, &reused_}) pages->clear();
  copies_.clear();
  replaced_.clear();
}

void PageGrowth::find_rows(const Call& call) {
  rows_.reserve(call.ids.size());
  for (const std::int64_t id : call.ids) rows_.push_back(&pool_.row(call.function, id));
  if (call.tokens == 0 || rows_.size() < 2) return;
  std::vector<std::int64_t> sorted = call.ids;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end())
    refuse(call.function, "sequences"_arg, " holds ", *twice, " twice, but tokens can be appended to each once");
}

// Chooses the pages to gain and to lose.
void PageGrowth::plan(const Call& call) {
  if (call.window >= 0)
    for (const PagePool::Row* row : rows_) {
      skipped_.push_back(unseen(*row, call.window));
      lost_.insert(lost_.end(), row->pages.begin(), row->pages.begin() + skipped_.back());
    }
  const std::vector<std::int32_t>& free = pool_.free_pages();
  const auto there = static_cast<std::int64_t>(free.size());
  std::int64_t needed = missing({});
  std::vector<std::int32_t> given;
  if (needed > there && !lost_.empty()) {
    Counts left;
    given = reusable(left);
    needed = missing(left);
    reused_ = lost_;
    std::sort(reused_.begin(), reused_.end());
  }
  const std::int64_t most = there + static_cast<std::int64_t>(given.size());
  if (needed > most) refuse<MemoryRefusal>(call.function, needed, " pages are needed, but ", most, " are free");
  taken_ = std::min(needed, there);
  gained_.assign(free.rbegin(), free.rbegin() + taken_);
  gained_.insert(gained_.end(), given.begin(), given.begin() + (needed - taken_));
}

// How many of a row's first pages hold only tokens that the next token does not see.
std::int64_t PageGrowth::unseen(const PagePool::Row& row, std::int64_t window) const {
  const std::int64_t pages = first_seen(row.length, window) / pool_.page_size() - row.start / pool_.page_size();
  return std::max<std::int64_t>(pages, 0);
}

// The pages that no row holds after all of `lost_` are released. Sets `left` to the number of rows that still hold each
// page of `lost_`.
std::vector<std::int32_t> PageGrowth::reusable(Counts& left) const {
  std::vector<std::int32_t> given;
  for (const std::int32_t page : lost_)
    if (--left.try_emplace(page, pool_.sharers(page)).first->second == 0) given.push_back(page);
  return given;
}

// How many pages the new tokens need. Finds the rows whose last page must be copied, because other rows share it.
// `left`: for each page that rows release, the number of rows that still hold it afterwards.
std::int64_t PageGrowth::missing(Counts left) {
  copied_.clear();
  std::int64_t pages = 0;
  std::vector<std::size_t> shared;
  for (std::size_t b = 0; b < rows_.size(); ++b) {
    const PagePool::Row& row = *rows_[b];
    pages += pool_.runs(row.length + tokens_) - pool_.runs(row.length);
    if (row.length % pool_.page_size() == 0) continue;
    if (pool_.sharers(row.pages[static_cast<std::size_t>(pool_.count(row) - 1)]) > 1) shared.push_back(b);
  }
  if (shared.empty()) return pages;
  copied_.resize(rows_.size());
  // Shortest first: the last row that holds a shared page writes to it in place. This row is the longest of them, so it
  // writes after the tokens of the others and overwrites none.
  std::stable_sort(shared.begin(), shared.end(),
                   [&](std::size_t a, std::size_t b) { return rows_[a]->length < rows_[b]->length; });
  for (const std::size_t b : shared) {
    const std::int32_t page = rows_[b]->pages[static_cast<std::size_t>(pool_.count(*rows_[b]) - 1)];
    std::int64_t& holders = left.try_emplace(page, pool_.sharers(page)).first->second;
    if (holders <= 1) continue;
    --holders;
    ++pages;
    copied_[b] = true;
  }
  return pages;
}

// Lists the pages of a sequence. If the row keeps all its pages, new pages are appended to the row's list. Otherwise, a
// new list is made, which replaces the row's list at the commit.
void PageGrowth::extend(std::size_t b, const std::int32_t*& fresh) {
  PagePool::Row& row = *rows_[b];
  const std::int64_t held = pool_.count(row), skipped = skipped_.empty() ? 0 : skipped_[b];
  const bool copied = !copied_.empty() && copied_[b];
  std::vector<std::int32_t>* pages = &row.pages;
  std::int64_t start = row.start;
  if (skipped > 0 || copied) {
    start += skipped * pool_.page_size();
    pages = &replaced_.emplace_back(Replacement{&row, {pages->begin() + skipped, pages->begin() + held}, start}).pages;
  } else if (tokens_ != 0) {
    pages->resize(static_cast<std::size_t>(held));  // any pages after these are left over from a failed call
  }
  if (copied) {
    copies_.push_back({pages->back(), *fresh});
    pages->back() = *fresh++;
  }
  const std::int64_t more = pool_.runs(row.length + tokens_) - pool_.runs(row.length);
  if (more > 0) pages->reserve(32);  // so that the list of a short sequence is allocated once
  pages->insert(pages->end(), fresh, fresh + more);
  fresh += more;
  sequences_.push_back({pages->data(), static_cast<std::int64_t>(pages->size()), start, &row.length});
}

void PageGrowth::claim(const CacheStore& store) {
  for (const PagedSequence& sequence : sequences_) {
    if (reused_.empty()) break;
    const std::int64_t written = *sequence.length / store.page_size - sequence.start / store.page_size;
    for (std::int64_t i = written; i < sequence.page_count; ++i)
      if (std::binary_search(reused_.begin(), reused_.end(), sequence.pages[i]))
        kept_.keep(store, sequence.pages[i], 0, store.page_size);
  }
  for (const Copy& copy : copies_) copy_page(store, copy.from, copy.to);
}

void PageGrowth::swap_rows() {
  for (Replacement& replaced : replaced_) {
    replaced.row->pages.swap(replaced.pages);
    std::swap(replaced.row->start, replaced.start);
  }
}

void PageGrowth::exchange() {
  swap_rows();
  pool_.take(taken_);
  for (const std::int32_t page : gained_) pool_.hold(page);
  for (const std::int32_t page : lost_) pool_.release(page);
}

void PageGrowth::exchange_back() {
  swap_rows();
  if (!gained_.empty() || !lost_.empty()) pool_.recount();
}

}  // namespace selfattn
