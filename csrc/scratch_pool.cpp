#include "scratch_pool.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "aligned_memory.h"

namespace selfattn {
namespace {

// Blocks come in four sizes per power of two, from 64 KiB to 128 MiB; larger ones are not kept.
constexpr std::size_t smallest = std::size_t{64} << 10;
constexpr unsigned classes = 45;
constexpr std::size_t class_bytes(unsigned c) { return smallest / 4 * (4 + c % 4) << c / 4; }
constexpr std::size_t most_kept = class_bytes(classes - 1);  // in all

unsigned class_for(std::size_t bytes) {
  unsigned c = 0;
  while (c < classes && class_bytes(c) < bytes) ++c;
  return c;
}

// A kept block is one word, so that taking or placing it is one exchange: its address, and in the bits that are zero
// in an address on a 64-byte boundary, its class.
using Word = std::uintptr_t;
constexpr Word class_mask = 63;
static_assert(classes <= class_mask);

unsigned class_of(Word word) { return static_cast<unsigned>(word & class_mask); }
char* memory_of(Word word) { return reinterpret_cast<char*>(word & ~class_mask); }

std::array<std::atomic<Word>, 32> kept;
std::atomic<std::size_t> kept_bytes;

// The smallest kept block that is large enough, or null.
char* take(unsigned& wanted) {
  while (true) {
    std::atomic<Word>* best = nullptr;
    Word found = 0;
    for (std::atomic<Word>& place : kept) {
      const Word word = place.load(std::memory_order_relaxed);
      if (word == 0 || class_of(word) < wanted || (best && class_of(word) >= class_of(found))) continue;
      best = &place;
      found = word;
    }
    if (!best) return nullptr;
    if (!best->compare_exchange_strong(found, 0, std::memory_order_acquire, std::memory_order_relaxed)) continue;
    wanted = class_of(found);
    kept_bytes.fetch_sub(class_bytes(wanted), std::memory_order_relaxed);
    return memory_of(found);
  }
}

bool keep(char* data, unsigned c) {
  if (kept_bytes.fetch_add(class_bytes(c), std::memory_order_relaxed) + class_bytes(c) <= most_kept)
    for (std::atomic<Word>& place : kept) {
      Word empty = 0;
      const Word word = reinterpret_cast<Word>(data) | c;
      if (place.compare_exchange_strong(empty, word, std::memory_order_release, std::memory_order_relaxed)) return true;
    }
  kept_bytes.fetch_sub(class_bytes(c), std::memory_order_relaxed);
  return false;
}

// Makes room for the blocks of today's calls.
void drop_all() {
  for (std::atomic<Word>& place : kept) {
    const Word word = place.exchange(0, std::memory_order_acquire);
    if (word == 0) continue;
    kept_bytes.fetch_sub(class_bytes(class_of(word)), std::memory_order_relaxed);
    std::free(memory_of(word));
  }
}

}  // namespace

Scratch::Scratch(std::size_t bytes) {
  if (bytes == 0) return;
  class_ = class_for(bytes);
  if (class_ < classes) data_ = take(class_);
  if (!data_) data_ = allocate_aligned(class_ < classes ? class_bytes(class_) : bytes);
}

Scratch::~Scratch() {
  if (!data_) return;
  if (class_ < classes) {
    if (keep(data_, class_)) return;
    drop_all();
    if (keep(data_, class_)) return;
  }
  std::free(data_);
}

}  // namespace selfattn
