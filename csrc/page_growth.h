// Room for the tokens that a call appends to sequences of a pool.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "page_changes.h"
#include "page_pool.h"

namespace selfattn {

// With a window, each sequence releases the pages that none of the new tokens sees. These pages are reused if there are
// not enough free ones. The pool does not change before the commit, except that pages may be appended to a row's list.
// The row does not hold them until the commit.
class PageGrowth : public PageChanges {
 public:
  struct Call {
    const char* function;
    const std::vector<std::int64_t>& ids;
    std::int64_t tokens;
    std::int64_t window;  // -1: none
  };
  explicit PageGrowth(PagePool& pool) : PageChanges({}), pool_(pool) {}  // the pool must outlive this object
  // Begins another call, and reuses the memory of the call before. Throws std::invalid_argument for sequences that
  // are not live or are named twice, and MemoryRefusal if there are not enough pages.
  void begin(const Call& call);
  void claim(const CacheStore& store) override;

 private:
  using Counts = std::unordered_map<std::int32_t, std::int64_t>;
  struct Replacement {  // of a row's pages and start; after a commit, the old ones
    PagePool::Row* row;
    std::vector<std::int32_t> pages;
    std::int64_t start;
  };
  struct Copy {
    std::int32_t from, to;
  };

  void clear();
  void find_rows(const Call& call);
  void plan(const Call& call);
  std::int64_t unseen(const PagePool::Row& row, std::int64_t window) const;
  std::int64_t missing(Counts left);
  std::vector<std::int32_t> reusable(Counts& left) const;
  void extend(std::size_t b, const std::int32_t*& fresh);
  void exchange() override;
  void exchange_back() override;
  void swap_rows();

  PagePool& pool_;
  std::vector<PagePool::Row*> rows_;
  std::vector<std::int64_t> skipped_;  // number of first pages that each row releases; empty: none
  std::vector<bool> copied_;           // whether each row's last page must be copied; empty: none
  std::int64_t taken_ = 0;             // pages from the end of the free list
  std::vector<std::int32_t> gained_, lost_, reused_;
  std::vector<Copy> copies_;
  std::vector<Replacement> replaced_;
};

}  // namespace selfattn
