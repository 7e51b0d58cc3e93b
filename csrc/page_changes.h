// The paged sequences of one call, and how the call changes them: it keeps copies of the tokens that it overwrites, and
// commits new lengths and pages.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "cache.h"

namespace selfattn {

// A sequence whose pages may be any pages of the store.
struct PagedSequence {
  const std::int32_t* pages = nullptr;  // the first page has token `start`; includes pages for the tokens to append
  std::int64_t page_count = 0;
  std::int64_t start = 0;
  std::int64_t* length = nullptr;  // copied at the start of a step; a step that appends commits the new length here
};

void copy_page(const CacheStore& store, std::int64_t from, std::int64_t to);

// Copies of stored tokens that a call overwrites.
class KeptTokens {
 public:
  void keep(const CacheStore& store, std::int64_t page, std::int64_t first_slot, std::int64_t count);
  void put_back() const;  // cannot fail
  void clear();

 private:
  struct Slots {  // of one head
    char* first;
    std::int64_t stride, count, bytes;  // from slot to slot, number of slots, bytes of a slot
    std::size_t copy;                   // where their copies start in copies_
  };
  std::vector<Slots> kept_;
  std::vector<char> copies_;
};

// Used directly if the caller of the core manages the pages: then a call does not change which pages a sequence holds.
// PageGrowth derives from this class for the sequences of a pool.
class PageChanges {
 public:
  explicit PageChanges(std::vector<PagedSequence> sequences, std::int64_t tokens = 0)
      : sequences_(std::move(sequences)), tokens_(tokens) {}
  PageChanges(const PageChanges&) = delete;
  PageChanges& operator=(const PageChanges&) = delete;
  virtual ~PageChanges() = default;

  const std::vector<PagedSequence>& sequences() const { return sequences_; }

  // Before tokens are stored: keeps the tokens that will be overwritten. If it throws, nothing has changed.
  virtual void claim(const CacheStore& store);
  // If the call fails: puts the kept tokens back.
  void abandon() const { kept_.put_back(); }
  // Sets the lengths of all sequences, and exchanges pages.
  void commit(const std::int64_t* lengths);
  // Reverts the commit. The sequences must not have changed since.
  void undo();

 protected:
  // exchange() makes all changes of a commit except those of lengths; exchange_back() reverts them. Neither can fail.
  virtual void exchange() {}
  virtual void exchange_back() {}

  std::vector<PagedSequence> sequences_;
  std::int64_t tokens_;  // that the call appends to each sequence
  KeptTokens kept_;
};

}  // namespace selfattn
