// The pages of a cache: which sequence holds which pages, and which pages are free. A sequence takes a page when it
// needs one. Sequences share the pages of a common prefix. Before a sequence writes to a shared page, it gets a page of
// its own with a copy. Tokens are not stored here.
#pragma once
#include <cstdint>
#include <map>
#include <vector>

namespace selfattn {

class PagePool {
 public:
  struct Row {
    std::vector<std::int32_t> pages;  // from the page of token `start` on; may be more than the tokens need
    std::int64_t start = 0;           // first token still held; always the first of its page
    std::int64_t length = 0;
  };
  using Rows = std::map<std::int64_t, Row>;  // by the ids of the sequences

  // `next_id` is the id of the first sequence that will be added. Ids are never reused.
  PagePool(std::int64_t num_pages, std::int64_t page_size, std::int64_t next_id = 0);

  std::int64_t page_size() const { return page_size_; }
  std::int64_t next_id() const { return next_id_; }
  const Rows& rows() const { return rows_; }
  const std::vector<std::int32_t>& free_pages() const { return free_pages_; }
  std::int64_t sharers(std::int32_t page) const { return sharers_[static_cast<std::size_t>(page)]; }
  std::int64_t runs(std::int64_t length) const;  // how many pages these tokens span
  std::int64_t count(const Row& row) const;      // how many pages a row holds

  // Throws std::invalid_argument if there is no such sequence.
  Row& row(const char* function, std::int64_t id);

  // If one of these functions throws, nothing has changed.
  std::int64_t add();                                        // an empty sequence; returns its id
  std::int64_t fork(const char* function, std::int64_t id);  // a sequence that shares all pages of another
  // Keeps the first `length` tokens of a sequence. Throws std::invalid_argument if it has fewer, or if queries with
  // this window (-1: none) would then see tokens that it no longer holds.
  void truncate(const char* function, std::int64_t id, std::int64_t length, std::int64_t window);
  void remove(const char* function, std::int64_t id);
  // Adds a sequence of another pool, of which this pool becomes a copy. Returns false if the row is impossible. Call
  // recount() after the last sequence: put() does not count the pages.
  bool put(std::int64_t id, const Row& row);

  // The changes that PageGrowth makes when it commits. They cannot fail.
  void take(std::int64_t count) { free_pages_.resize(free_pages_.size() - static_cast<std::size_t>(count)); }
  void hold(std::int32_t page) { ++sharers_[static_cast<std::size_t>(page)]; }
  void release(std::int32_t page);
  void recount();  // derives sharers and free pages from the rows

 private:
  std::int64_t page_size_, next_id_;
  Rows rows_;
  std::vector<std::int64_t> sharers_;     // how many rows hold each page
  std::vector<std::int32_t> free_pages_;  // the last one is taken first; has capacity for all pages
};

}  // namespace selfattn
