// The lengths of a cache whose sequences have one page each; with a window, this page is a ring. Other processes may
// write to this memory.
#pragma once
#include <cstdint>

namespace selfattn {

// There are two copies of the lengths, of which one is valid: a single 8-byte store changes all lengths together.
class Ledger {
 public:
  // `active` is the index of the valid copy, 0 or 1. `copies` is (2, 2, sequences): each copy has the lengths, then the
  // first tokens still held.
  Ledger(std::int64_t* active, std::int64_t* copies, std::int64_t sequences)
      : active_(active), copies_(copies), sequences_(sequences) {}

  // Reads each number exactly once.
  void read(std::int64_t* lengths, std::int64_t* starts) const;
  // Writes the copy that is not valid, then makes it valid. Without starts, all are 0.
  void publish(const std::int64_t* lengths, const std::int64_t* starts) const;
  // Makes the other copy valid: the one that was valid before the last publish().
  void undo() const;

 private:
  std::int64_t valid() const;
  void make_valid(std::int64_t copy) const;
  std::int64_t* copy(std::int64_t index) const { return copies_ + index * 2 * sequences_; }

  std::int64_t *active_, *copies_;
  std::int64_t sequences_;
};

}  // namespace selfattn
