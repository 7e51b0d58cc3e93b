#include "scratch_pool.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "aligned_memory.h"

namespace selfattn {
namespace {

// Buffers come in four sizes per power of two, from 64 KiB to 128 MiB; larger ones are not kept.
constexpr std::size_t smallest = std::size_t{64} << 10;
constexpr unsigned classes = 45;
constexpr std::size_t class_bytes(unsigned c) { return smallest / 4 * (4 + c % 4) << c / 4; }
constexpr std::size_t most_kept = class_bytes(classes - 1);  // in total

unsigned class_for(std::size_t bytes) {
  unsigned c = 0;
  while (c < classes && class_bytes(c) < bytes) ++c;
  return c;
}

// A kept buffer is a single pointer, so that one atomic exchange takes or stores it. Buffers have 64-byte alignment, so
// the low 6 bits of the pointer are free for the buffer's size class.
constexpr std::uintptr_t boundary = 64;
static_assert(classes < boundary);

unsigned class_of(const char* mark) { return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(mark) % boundary); }
char* buffer_of(char* mark) { return mark - class_of(mark); }

std::array<std::atomic<char*>, 32> kept;
std::atomic<std::size_t> kept_bytes;

// The smallest kept buffer that is large enough, or null.
char* take(unsigned& wanted) {
  while (true) {
    std::atomic<char*>* best = nullptr;
    char* found = nullptr;
    for (std::atomic<char*>& holder : kept) {
      char* mark = holder.load(std::memory_order_relaxed);
      if (!mark || class_of(mark) < wanted || (best && class_of(mark) >= class_of(found))) continue;
      best = &holder;
      found = mark;
    }
    if (!best) return nullptr;
    if (!best->compare_exchange_strong(found, nullptr, std::memory_order_acquire, std::memory_order_relaxed)) continue;
    wanted = class_of(found);
    kept_bytes.fetch_sub(class_bytes(wanted), std::memory_order_relaxed);
    return buffer_of(found);
  }
}

bool keep(char* data, unsigned c) {
  if (kept_bytes.fetch_add(class_bytes(c), std::memory_order_relaxed) + class_bytes(c) <= most_kept)
    for (std::atomic<char*>& holder : kept) {
      char* empty = nullptr;
      if (holder.compare_exchange_strong(empty, data + c, std::memory_order_release, std::memory_order_relaxed))
        return true;
    }
  kept_bytes.fetch_sub(class_bytes(c), std::memory_order_relaxed);
  return false;
}

// Frees all kept buffers, to make room for buffers of the sizes in use now.
void drop_all() {
  for (std::atomic<char*>& holder : kept) {
    char* mark = holder.exchange(nullptr, std::memory_order_acquire);
    if (!mark) continue;
    kept_bytes.fetch_sub(class_bytes(class_of(mark)), std::memory_order_relaxed);
    std::free(buffer_of(mark));
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
