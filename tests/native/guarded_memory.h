// Memory that ends where an inaccessible page, its guard, begins: an access beyond its end is a fault. Another guard
// precedes the page in which it begins.
#pragma once
#include <cstddef>

namespace selfattn::test {

class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes, std::size_t pieces = 1);  // pieces of `bytes` bytes each
  ~GuardedMemory();
  GuardedMemory(GuardedMemory&& other) noexcept;
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  char* data() const { return first_; }           // the first piece
  std::size_t stride() const { return stride_; }  // bytes from one piece to the next; each piece ends at a guard

 private:
  char* map_;
  char* first_;
  std::size_t stride_;
  std::size_t mapped_;
};

// Whole pages between two guards. All calls return the same pages.
struct GuardedArea {
  char* begin;
  char* end;
};
GuardedArea guarded_area();

}  // namespace selfattn::test
