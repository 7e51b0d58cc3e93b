// Memory for the time of a call, kept for the next one: at most 128 MiB in all. Safe to use from many threads and after
// fork: no locks.
#pragma once
#include <cstddef>

namespace selfattn {

// At least `bytes` bytes on a 64-byte boundary. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  unsigned class_ = 0;  // of the block's size
};

}  // namespace selfattn
