#include "ledger.h"

#include <algorithm>
#include <atomic>

namespace selfattn {
namespace {

void copy_shared(std::int64_t* to, std::int64_t* from, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = std::atomic_ref(from[i]).load(std::memory_order_relaxed);
}

}  // namespace

bool is_possible(std::int64_t start, std::int64_t length, std::int64_t capacity, bool ring) {
  constexpr std::int64_t longest = (std::int64_t{1} << 61) - 1;  // beyond it, positions could overflow
  if (start < 0 || start > length || length - start > capacity) return false;
  return ring ? length <= longest : start == 0;
}

std::int64_t Ledger::valid() const { return std::atomic_ref(*active_).load(std::memory_order_acquire) & 1; }

void Ledger::make_valid(std::int64_t copy) const { std::atomic_ref(*active_).store(copy, std::memory_order_release); }

void Ledger::read(std::int64_t* lengths, std::int64_t* starts) const {
  std::int64_t* const from = copy(valid());
  copy_shared(lengths, from, sequences_);
  copy_shared(starts, from + sequences_, sequences_);
}

void Ledger::publish(const std::int64_t* lengths, const std::int64_t* starts) const {
  const std::int64_t other = 1 - valid();
  std::int64_t* const to = copy(other);
  std::copy_n(lengths, sequences_, to);
  if (starts)
    std::copy_n(starts, sequences_, to + sequences_);
  else
    std::fill_n(to + sequences_, sequences_, 0);
  make_valid(other);
}

void Ledger::undo() const { make_valid(1 - valid()); }

}  // namespace selfattn
