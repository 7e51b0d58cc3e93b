// Memory between two inaccessible pages: a read or write beyond its ends is a fault.
#pragma once
#include <cstddef>

namespace selfattn::test {

class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes, std::size_t pieces = 1);  // `bytes` each
  ~GuardedMemory();
  GuardedMemory(GuardedMemory&& other) noexcept;
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  char* data() const { return first_; }       // ends where the second guard begins
  std::size_t step() const { return step_; }  // bytes from piece to piece; each piece ends at a guard

 private:
  char* map_;
  char* first_;
  std::size_t step_;
  std::size_t mapped_;
};

// Pages with a guard on either side. All calls return the same pages.
struct GuardedArea {
  char* begin;
  char* end;
};
GuardedArea guarded_area();

}  // namespace selfattn::test
