// One call on a cache, the same for every kind of cache and every caller: copy the lengths, check them, claim what will
// be overwritten, store new tokens, attend, and commit the new lengths last.
#pragma once
#include <cstdint>
#include <optional>

#include "cache.h"
#include "scratch_pool.h"

namespace selfattn {

// The arrays of a cache: blocks of `slots` tokens for each head. A block belongs to one sequence, or is a page.
struct CacheStore {
  DType dtype = DType::f32;
  std::int64_t blocks = 0, num_kv_heads = 0, slots = 0;
  Cache::Side key, value;  // TokenRows::batch is the distance from block to block
};

// Where a cache with a block for each sequence keeps its lengths. Other processes may write to this memory.
struct Ledger {
  std::int64_t* active = nullptr;  // which of the two copies is in force: 0 or 1
  std::int64_t* copies = nullptr;  // (2, 2, blocks): in each copy the lengths, then the first tokens still held
  std::int64_t window = -1;        // -1: none; otherwise blocks are rings
};

// What a sequence in pages holds before a call.
struct PagedSequence {
  const std::int32_t* pages = nullptr;  // from the page of token `start` on, with room for what the call appends
  std::int64_t page_count = 0;
  std::int64_t start = 0, length = 0;
};

// What a call uses of a cache. With a ledger, blocks are sequences; without, they are pages of `sequences`.
struct CacheSource {
  const CacheStore* store = nullptr;
  const Ledger* ledger = nullptr;
  const PagedSequence* sequences = nullptr;
  std::int64_t batch = 0;
};

// Lengths and starts are read once: the copies are checked, used and committed.
class CacheStep {
 public:
  // For a call that appends `more` tokens to each sequence. Refuses what there is no room for, lengths that are
  // impossible, and pages outside the store. Allocates all memory of the step. The source must outlive it.
  CacheStep(const char* function, const CacheSource& source, std::int64_t more);
  CacheStep(const CacheStep&) = delete;  // views point to its own memory
  CacheStep& operator=(const CacheStep&) = delete;

  const Cache& cache() const { return cache_; }
  const std::int64_t* lengths_after() const { return after_; }

  // Makes what the cache will hold the keys and values of an attention call.
  void place(AttentionArguments& arguments);

  // Writes new tokens (batch, tokens, heads, width) after those that the cache holds.
  void store(const KernelSet& kernels, const TensorView& keys, const TensorView& values) const;

  // Claims, works and commits. Where `work` throws, lengths stay as they were.
  template <class Work>
  void run(Work work) const {
    claim();
    work();
    commit();
  }

  // Lets sequence b continue as sequence index[b] was. Needs a ledger.
  void reorder(const std::int64_t* index) const;

 private:
  void open_blocks(const char* function);
  void check_room(const char* function) const;
  void open_pages(const char* function);
  void use_starts();
  bool ring() const { return source_.ledger && source_.ledger->window >= 0; }
  // In a ring the tokens that will be overwritten are gone from now on, whatever happens next.
  void claim() const;
  // Sequences in pages have their lengths from their owner, who commits them.
  void commit() const;
  void publish(std::int64_t more, const std::int64_t* index = nullptr) const;

  const CacheSource source_;
  const std::int64_t more_;
  Cache cache_{};
  const Scratch memory_;  // of the following arrays
  std::int64_t *lengths_, *after_, *starts_;
  Pages::Row* rows_;
  char* row_;  // see store_tokens
  std::int64_t starts_step_ = sizeof(std::int64_t);
  std::optional<CachedKeys> keys_;
};

}  // namespace selfattn
