// One call on a cache. The steps are the same for every kind of cache and every caller: copy the lengths, check them,
// claim the tokens that will be overwritten, store new tokens, attend, and commit the new lengths last.
#pragma once
#include <cstdint>
#include <optional>

#include "cache.h"
#include "scratch_pool.h"

namespace selfattn {

// The arrays of a cache: pages of `page_size` tokens for each head.
struct CacheStore {
  DType dtype = DType::f32;
  std::int64_t num_pages = 0, num_kv_heads = 0, page_size = 0;
  Cache::Rows key, value;    // TokenRows::batch is the stride between pages
  std::int64_t window = -1;  // the largest distance to the left that queries may see; -1: the cache keeps all tokens
};

// The lengths of a cache whose sequences have one page each; with a window, this page is a ring. Other processes may
// write to this memory.
struct Ledger {
  std::int64_t* active = nullptr;  // index of the valid copy: 0 or 1
  std::int64_t* copies = nullptr;  // (2, 2, sequences): each copy has the lengths, then the first tokens still held
};

// A sequence whose pages may be any pages of the store.
struct PagedSequence {
  const std::int32_t* pages = nullptr;  // the first has token `start`; includes pages for the tokens to append
  std::int64_t page_count = 0;
  std::int64_t start = 0;
  std::int64_t* length = nullptr;  // copied at the start of a step; a step that appends commits the new length here
};

// The cache of a call: with a ledger, or with paged sequences.
struct CacheSource {
  const CacheStore* store = nullptr;
  const Ledger* ledger = nullptr;
  const PagedSequence* sequences = nullptr;
  std::int64_t batch = 0;
  std::int64_t skipped = 0;  // tokens at the start of paged sequences that the call does not read; whole pages
};

// Reads lengths and starts only once, since other processes may change them, and then checks, uses and commits its own
// copies.
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

  // Sets the keys and values of an attention call to the contents of the cache after the append. Throws
  // std::invalid_argument if the call may look farther to the left than the cache's window.
  void present(AttentionArguments& arguments);

  // Throws std::invalid_argument if a query of the call sees tokens that the cache no longer holds.
  void check_seen(const char* function, const Problem& problem) const;

  // Writes new tokens (batch, tokens, heads, width) after the end of each sequence.
  void store(const KernelSet& kernels, const TensorView& keys, const TensorView& values) const;

  // Claims the tokens to be overwritten, calls work() and commits the new lengths. If `work` throws, the lengths do not
  // change.
  template <class Work>
  void run(Work work) const {
    claim();
    work();
    commit();
  }

  // Replaces each sequence b by a copy of sequence index[b]. Needs a ledger. Allocates memory for the copies of one
  // head.
  void reorder(const std::int64_t* index) const;

 private:
  void open_ledger(const char* function);
  void check_room(const char* function) const;
  void open_pages(const char* function);
  void use_starts();
  bool ring() const { return source_.ledger && source_.store->window >= 0; }
  // In a ring, publishes that the tokens to be overwritten are no longer held. This is not undone if the call fails.
  void claim() const;
  // Publishes the new lengths.
  void commit() const;
  void publish(std::int64_t more, const std::int64_t* index = nullptr) const;

  const CacheSource source_;
  const std::int64_t more_;
  Cache cache_{};
  std::optional<Scratch> memory_;  // backs the following arrays
  std::int64_t *lengths_, *after_, *starts_;
  Pages::Row* rows_;
  char* token_;  // a TokenMemory
  std::int64_t starts_step_ = sizeof(std::int64_t);
  std::optional<CachedKeys> keys_;
};

}  // namespace selfattn
