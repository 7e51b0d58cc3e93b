// Memory between two pages that nobody may touch: whoever reads or writes beyond its ends is caught in the act.
#pragma once
#include <cstddef>

namespace selfattn::test {

class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes);
  ~GuardedMemory();
  GuardedMemory(GuardedMemory&& other) noexcept;
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  char* data() const { return end_ - bytes_; }  // ends where the second guard begins

 private:
  char* map_;
  char* end_;
  std::size_t bytes_;
  std::size_t mapped_;
};

// The ends of some pages, always the same ones: a guard on either side.
struct GuardedArea {
  char* begin;
  char* end;
};
GuardedArea guarded_area();

}  // namespace selfattn::test
