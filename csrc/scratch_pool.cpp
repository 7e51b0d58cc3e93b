#include "scratch_pool.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "aligned_memory.h"

namespace selfattn {
namespace {

constexpr std::size_t granule = std::size_t{64} << 10;
constexpr std::size_t largest_kept = std::size_t{8}
                                     << 20;  // a call that needs more is long: allocating costs it little
constexpr int places = 32;

// The size stands in the block itself, so that a place is one word and taking it one exchange.
struct Block {
  std::size_t size;
};
constexpr std::size_t header = 64;

std::atomic<Block*> kept[places];

void release(Block* block) { std::free(block); }

}  // namespace

Scratch::Scratch(std::size_t bytes) {
  if (bytes == 0) return;
  for (std::atomic<Block*>& place : kept) {
    if (!place.load(std::memory_order_relaxed)) continue;
    Block* block = place.exchange(nullptr, std::memory_order_acquire);
    if (!block) continue;
    if (block->size >= bytes) {
      data_ = reinterpret_cast<char*>(block) + header;
      size_ = block->size;
      return;
    }
    release(block);  // too small for today's calls: make room for a larger one
  }
  size_ = (bytes + granule - 1) / granule * granule;
  Block* block = new (allocate_aligned(size_ + header)) Block{size_};
  data_ = reinterpret_cast<char*>(block) + header;
}

Scratch::~Scratch() {
  if (!data_) return;
  Block* block = reinterpret_cast<Block*>(data_ - header);
  if (size_ <= largest_kept)
    for (std::atomic<Block*>& place : kept) {
      Block* empty = nullptr;
      if (place.compare_exchange_strong(empty, block, std::memory_order_release, std::memory_order_relaxed)) return;
    }
  release(block);
}

}  // namespace selfattn
