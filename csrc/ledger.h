// The lengths of a cache whose sequences have one page each; with a window, this page is a ring. Other processes may
// write to this memory.
#pragma once
#include <cstdint>

namespace selfattn {

// Whether a sequence of a cache with this capacity can hold the tokens [start, length). `ring`: the cache has a window.
bool is_possible(std::int64_t start, std::int64_t length, std::int64_t capacity, bool ring);

// There are two copies of the lengths, and one of them is valid. A single 8-byte store makes the other copy valid, and
// so changes all lengths at once.
class Ledger {
 public:
  // `active` is the index of the valid copy, 0 or 1. `copies` is (2, 2, sequences): each copy has the lengths, then the
  // first token that each sequence still holds.
  Ledger(std::int64_t* active, std::int64_t* copies, std::int64_t sequences)
      : active_(active), copies_(copies), sequences_(sequences) {}

  // Reads each number exactly once.
  void read(std::int64_t* lengths, std::int64_t* starts) const;
  // Writes the copy that is not valid, then makes it valid. If `starts` is null, all starts are 0.
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
