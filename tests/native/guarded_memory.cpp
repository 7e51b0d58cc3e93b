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

GuardedMemory::GuardedMemory(std::size_t bytes) : bytes_(bytes) {
  const std::size_t page = page_size();
  const std::size_t usable = (bytes + page - 1) / page * page;
  mapped_ = usable + 2 * page;
  void* map = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  map_ = static_cast<char*>(map);
  end_ = map_ + page + usable;
  if (usable > 0 && mprotect(map_ + page, usable, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

GuardedMemory::~GuardedMemory() {
  if (map_) munmap(map_, mapped_);
}

GuardedMemory::GuardedMemory(GuardedMemory&& other) noexcept
    : map_(std::exchange(other.map_, nullptr)), end_(other.end_), bytes_(other.bytes_), mapped_(other.mapped_) {}

GuardedArea guarded_area() {
  constexpr std::size_t least = std::size_t{16} << 10;
  static const std::size_t bytes = std::max(least, page_size());  // both are powers of two: whole pages
  static const GuardedMemory memory(bytes);
  return {memory.data(), memory.data() + bytes};
}

}  // namespace selfattn::test
