// Memory for the time of a call, kept for the next one. Safe to use from many threads and after fork: no locks.
#pragma once
#include <cstddef>
#include <utility>

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
  std::size_t size_ = 0;
};

}  // namespace selfattn
