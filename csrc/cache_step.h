// One call on a cache. The stages are the same for every kind of cache and every caller: copy the lengths, check them,
// claim the tokens that will be overwritten, store new tokens, attend, and commit the new lengths last.
#pragma once
#include <cstdint>
#include <optional>

#include "cache.h"
#include "ledger.h"
#include "page_changes.h"
#include "rehearsal.h"
#include "scratch_pool.h"

namespace selfattn {

// The cache of a call. Its lengths are either in a ledger or in paged sequences; the other pointer is null.
struct CacheSource {
  const CacheStore* store = nullptr;
  const Ledger* ledger = nullptr;
  PageChanges* pages = nullptr;
  std::int64_t batch = 0;
  std::int64_t skipped = 0;  // tokens at the start of paged sequences that the call does not read; whole pages
};

// Other processes may change lengths and starts during a call. CacheStep therefore reads each of them only once. It
// checks, uses and commits its own copies.
class CacheStep {
 public:
  // For a call that appends `more` tokens to each sequence. Throws std::invalid_argument if there is no room for them,
  // if lengths are impossible, or if pages are outside the store. Allocates all memory of the step. The objects that
  // `source` points to must outlive the step.
  CacheStep(const char* function, const CacheSource& source, std::int64_t more);
  CacheStep(const CacheStep&) = delete;  // views point into this object
  CacheStep& operator=(const CacheStep&) = delete;

  const Cache& cache() const { return cache_; }
  const std::int64_t* lengths_after() const { return after_; }

  // The problem of an attention call whose keys and values are the contents of the cache after the append. Throws like
  // make_problem. Also throws if the call's window reaches farther to the left than the cache's window, if a query
  // would see tokens that the cache no longer holds, or if the call's kv_starts do not fit the cache.
  Problem problem_of(AttentionArguments arguments);

  // Writes new tokens (batch, tokens, heads, width) after the end of each sequence.
  void store(const KernelSet& kernels, const TensorView& keys, const TensorView& values) const;

  // Claims the tokens to be overwritten, calls work() and commits the new lengths. If anything throws, lengths and
  // pages do not change.
  template <class Work>
  void run(Work work) const {
    if (more_ == 0 || Rehearsal::active()) return work();
    claim();
    try {
      work();
    } catch (...) {
      if (source_.pages) source_.pages->abandon();
      throw;
    }
    commit();
  }

  // The following need a ledger. Each ends with a commit.
  // Replaces each sequence b by a copy of sequence index[b]. Allocates memory for the copies of one head.
  void reorder(const std::int64_t* index) const;
  // Keeps the first lengths[b] tokens of each sequence b. Throws like check_cut.
  void truncate(const char* function, const std::int64_t* lengths) const;
  // Gives each sequence b the tokens [starts[b], lengths[b]), which are already in the cache's arrays.
  void set(const std::int64_t* lengths, const std::int64_t* starts) const;

 private:
  void open_ledger(const char* function);
  void check_room(const char* function) const;
  void open_pages(const char* function);
  void use_starts();
  void check_window(const AttentionArguments& arguments) const;
  void check_seen(const char* function, const Problem& problem) const;
  // Returns the starts of a call with kv_starts: for each sequence, the later of the given start and the cache's start.
  TensorView later_starts(const char* function, const TensorView& kv_starts);
  bool ring() const { return source_.ledger && source_.store->window >= 0; }
  // In a ring, publishes that the tokens to be overwritten are no longer held. A failed call does not undo this.
  void claim() const;
  // Commits the lengths after_ and, in a ring, starts_. In a ledger without a ring, all starts are 0.
  void commit() const;

  const CacheSource source_;
  const std::int64_t more_;
  Cache cache_{};
  std::optional<Scratch> memory_;  // backs the following arrays
  std::int64_t *lengths_, *after_, *starts_, *later_;
  Pages::Table* tables_;
  char* token_;  // a TokenMemory
  std::int64_t starts_stride_ = sizeof(std::int64_t);
  std::optional<CachedKeys> keys_;
};

}  // namespace selfattn
