#include "page_changes.h"

#include <algorithm>

#include "rows.h"

namespace selfattn {
namespace {

// Calls use(address of a slot, the array's strides, bytes per slot) for each head of each array.
template <class Use>
void each_head(const CacheStore& store, std::int64_t page, std::int64_t slot, Use use) {
  for (const Cache::Rows* side : {&store.key, &store.value})
    for (const TokenRows* rows : {&side->tokens, &side->scales}) {
      if (!rows->data) continue;
      const std::int64_t bytes = rows == &side->scales ? size_of(DType::f32) : row_bytes(store.dtype, side->width);
      char* const first = rows->data + page * rows->batch + slot * rows->row;
      for (std::int64_t head = 0; head < store.num_kv_heads; ++head) use(first + head * rows->head, *rows, bytes);
    }
}

}  // namespace

void copy_page(const CacheStore& store, std::int64_t from, std::int64_t to) {
  each_head(store, from, 0, [&](char* slots, const TokenRows& array, std::int64_t bytes) {
    copy_rows({slots + (to - from) * array.batch, array.row, 1}, {slots, array.row, 1}, store.page_size, bytes, 1);
  });
}

void KeptTokens::keep(const CacheStore& store, std::int64_t page, std::int64_t first_slot, std::int64_t count) {
  each_head(store, page, first_slot, [&](char* first, const TokenRows& array, std::int64_t bytes) {
    const std::size_t copy = copies_.size();
    copies_.resize(copy + static_cast<std::size_t>(count * bytes));
    kept_.push_back({first, array.row, count, bytes, copy});
    copy_rows({copies_.data() + copy, bytes, 1}, {first, array.row, 1}, count, bytes, 1);
  });
}

void KeptTokens::put_back() const {
  for (const Slots& kept : kept_)
    copy_rows({kept.first, kept.stride, 1}, {copies_.data() + kept.copy, kept.bytes, 1}, kept.count, kept.bytes, 1);
}

void KeptTokens::clear() {
  kept_.clear();
  copies_.clear();
}

void PageChanges::claim(const CacheStore& store) {
  for (const PagedSequence& sequence : sequences_) {
    const std::int64_t first = *sequence.length, end = first + tokens_;
    for (std::int64_t token = first; token < end;) {
      const std::int64_t slot = token % store.page_size, count = std::min(store.page_size - slot, end - token);
      const std::int64_t index = token / store.page_size - sequence.start / store.page_size;
      kept_.keep(store, sequence.pages[index], slot, count);
      token += count;
    }
  }
}

void PageChanges::commit(const std::int64_t* lengths) {
  for (std::size_t b = 0; b < sequences_.size(); ++b) *sequences_[b].length = lengths[b];
  exchange();
}

void PageChanges::undo() {
  for (const PagedSequence& sequence : sequences_) *sequence.length -= tokens_;
  exchange_back();
  kept_.put_back();
}

}  // namespace selfattn
