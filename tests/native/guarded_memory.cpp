#include "guarded_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <utility>

namespace selfattn::test {
namespace {

std::size_t page_size() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

GuardedMemory::GuardedMemory(std::size_t bytes, std::size_t pieces) {
  const std::size_t page = page_size();
  const std::size_t usable = (bytes + page - 1) / page * page;
  stride_ = usable + page;
  mapped_ = pieces * stride_ + page;
  void* map = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  map_ = static_cast<char*>(map);
  first_ = map_ + stride_ - bytes;
  for (std::size_t i = 0; usable > 0 && i < pieces; ++i)
    if (mprotect(map_ + page + i * stride_, usable, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

GuardedMemory::~GuardedMemory() {
  if (map_) munmap(map_, mapped_);
}

GuardedMemory::GuardedMemory(GuardedMemory&& other) noexcept
    : map_(std::exchange(other.map_, nullptr)), first_(other.first_), stride_(other.stride_), mapped_(other.mapped_) {}

GuardedArea guarded_area() {
  constexpr std::size_t least = std::size_t{16} << 10;
  static const std::size_t bytes = std::max(least, page_size());  // both are powers of two: whole pages
  static const GuardedMemory memory(bytes);
  return {memory.data(), memory.data() + bytes};
}

}  // namespace selfattn::test
