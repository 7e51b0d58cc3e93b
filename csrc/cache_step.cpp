#include "cache_step.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "arithmetic.h"
#include "carver.h"
#include "message.h"

namespace selfattn {
namespace {

Cache::Rows in_pages(Cache::Rows cached) {
  for (TokenRows* rows : {&cached.tokens, &cached.scales}) std::swap(rows->page, rows->batch);
  return cached;
}

}  // namespace

CacheStep::CacheStep(const char* function, const CacheSource& source, std::int64_t more)
    : source_(source), more_(more) {
  const CacheStore& store = *source.store;
  const TokenMemory row(nullptr, std::max(store.key.width, store.value.width));
  const auto divide = [&](char* base) {
    Carver carver{base};
    for (std::int64_t** array : {&lengths_, &after_, &starts_, &later_})
      *array = carver.take<std::int64_t>(source.batch);
    tables_ = carver.take<Pages::Table>(source.batch);
    token_ = carver.take<char>(static_cast<std::int64_t>(row.bytes));
    return carver.used;
  };
  memory_.emplace(divide(nullptr));
  divide(memory_->data());
  cache_.dtype = store.dtype;
  cache_.batch = source.batch;
  cache_.num_kv_heads = store.num_kv_heads;
  cache_.key = source.ledger ? store.key : in_pages(store.key);
  cache_.value = source.ledger ? store.value : in_pages(store.value);
  cache_.lengths = lengths_;
  if (source.ledger)
    open_ledger(function);
  else
    open_pages(function);
  for (std::int64_t b = 0; b < source.batch; ++b) after_[b] = lengths_[b] + more;
  keys_.emplace(cache_, after_);
}

void CacheStep::use_starts() { cache_.starts = {starts_, DType::i64, 1, &source_.batch, &starts_stride_}; }

void CacheStep::open_ledger(const char* function) {
  const std::int64_t batch = source_.batch, capacity = source_.store->page_size;
  source_.ledger->read(lengths_, starts_);
  for (std::int64_t b = 0; b < batch; ++b)
    if (!is_possible(starts_[b], lengths_[b], capacity, ring()))
      refuse(function, "the cache's buffer says that sequence ", b, " has the tokens ", starts_[b], " to ", lengths_[b],
             ", which is impossible");
  check_room(function);
  if (!ring()) return;
  cache_.pages.size = capacity;
  for (std::int64_t b = 0; b < batch; ++b) starts_[b] = std::max(starts_[b], lengths_[b] + more_ - capacity);
  use_starts();
}

void CacheStep::check_room(const char* function) const {
  const std::int64_t capacity = source_.store->page_size, window = source_.store->window;
  if (ring()) {
    if (more_ > capacity - window)
      refuse(function, more_, " tokens at once, but a ring of ", capacity, " slots with a window of ", window,
             " takes at most ", capacity - window);
    return;
  }
  for (std::int64_t b = 0; b < source_.batch; ++b)
    if (lengths_[b] > capacity - more_)
      refuse(function, "sequence ", b, " holds ", lengths_[b], " tokens, so that ", more_, " more exceed the capacity ",
             capacity);
}

// Checks the pages of each sequence, from the page of the first token that is read to the page of the last token that
// is appended. Other pages are never read.
void CacheStep::open_pages(const char* function) {
  static const std::int32_t nothing = 0;
  const std::int64_t page_size = source_.store->page_size, num_pages = source_.store->num_pages;
  cache_.pages = {page_size, tables_};
  bool started = false;
  for (std::int64_t b = 0; b < source_.batch; ++b) {
    const PagedSequence& sequence = source_.pages->sequences()[static_cast<std::size_t>(b)];
    const std::int64_t length = lengths_[b] = *sequence.length;
    const std::int64_t start = starts_[b] = std::max(sequence.start, source_.skipped);
    started = started || start != 0;
    if (sequence.start < 0 || start > length)
      refuse(function, "sequence ", b, " has the tokens ", start, " to ", length, ", which is impossible");
    const std::int64_t first = start / page_size, unread = first - sequence.start / page_size;
    const std::int64_t used = std::max<std::int64_t>(ceil_div(length + more_, page_size) - first, 0);
    if (used > sequence.page_count - unread) refuse(function, "the pages of sequence ", b, " do not fit its length");
    const std::int32_t* const pages = used > 0 ? sequence.pages + unread : &nothing;
    tables_[b] = {pages, first};
    const auto inside = [&](std::int32_t page) { return page >= 0 && page < num_pages; };
    const std::int64_t sound = std::find_if_not(pages, pages + used, inside) - pages;
    if (sound < used)
      refuse(function, "block_table"_arg, " gives sequence ", b, " a page outside 0..", num_pages - 1, " (entry ",
             first + sound, ")");
  }
  if (started) use_starts();
}

Problem CacheStep::problem_of(AttentionArguments arguments) {
  check_window(arguments);
  const TensorView asked = arguments.kv_starts;
  keys_->present(arguments);
  if (asked) arguments.kv_starts = later_starts(arguments.function, asked);
  arguments.recent_mask = static_cast<bool>(arguments.mask);
  Problem problem = make_problem(arguments);
  check_seen(arguments.function, problem);
  return problem;
}

void CacheStep::check_window(const AttentionArguments& arguments) const {
  const std::int64_t window = source_.store->window, left = arguments.window_left;
  if (window >= 0 && (left < 0 || left > window))
    refuse(arguments.function, "window"_arg, " is ", left < 0 ? "none" : std::to_string(left) + " to the left",
           ", but the cache keeps only the tokens that a window of ", window, " sees");
}

TensorView CacheStep::later_starts(const char* function, const TensorView& kv_starts) {
  if (kv_starts.ndim > 1 || (kv_starts.ndim == 1 && kv_starts.shape[0] != source_.batch))
    refuse(function, "kv_starts"_arg, " has shape ", shape_text(kv_starts), ", but (", source_.batch, ",) is needed");
  const std::int64_t stride = kv_starts.ndim == 1 ? kv_starts.strides[0] : 0;
  for (std::int64_t b = 0; b < source_.batch; ++b) {
    const std::int64_t start = integer_at(static_cast<const char*>(kv_starts.data) + b * stride);
    if (start < 0 || start > after_[b])
      refuse(function, "kv_starts"_arg, " holds ", start, ", which is outside 0..", after_[b], " (sequence ", b, ")");
    later_[b] = cache_.starts ? std::max(start, starts_[b]) : start;
  }
  return {later_, DType::i64, 1, &source_.batch, &starts_stride_};
}

void CacheStep::check_seen(const char* function, const Problem& problem) const {
  if (source_.store->window < 0 || problem.q_len == 0) return;
  for (std::int64_t b = 0; b < source_.batch; ++b) {
    ValidKeys all = valid_keys(problem, b);
    all.begin = 0;
    if (visible_keys(0, all).begin < starts_[b])  // no later query sees farther back
      refuse(function, "q"_arg, " has ", problem.q_len,
             " queries for stored tokens, and the first would see tokens before ", starts_[b], ", which sequence ", b,
             " no longer holds");
  }
}

void CacheStep::store(const KernelSet& kernels, const TensorView& keys, const TensorView& values) const {
  if (Rehearsal::active()) return;
  store_tokens(kernels, cache_, cache_.key, keys, token_);
  if (!shares_rows(cache_)) store_tokens(kernels, cache_, cache_.value, values, token_);
}

void CacheStep::claim() const {
  if (source_.pages) return source_.pages->claim(*source_.store);
  if (ring()) source_.ledger->publish(lengths_, starts_);
}

void CacheStep::commit() const {
  if (source_.pages) return source_.pages->commit(after_);
  source_.ledger->publish(after_, ring() ? starts_ : nullptr);
}

void CacheStep::reorder(const std::int64_t* index) const {
  std::int64_t used = 0;
  for (std::int64_t b = 0; b < cache_.batch; ++b)
    used = std::max(used, std::min(lengths_[b], source_.store->page_size));
  const TokenRows* const arrays[] = {&cache_.key.tokens, &cache_.value.tokens, &cache_.key.scales,
                                     &cache_.value.scales};
  std::int64_t most = 0;
  for (const TokenRows* rows : arrays) most = std::max(most, used * rows->row);
  const Scratch copy(static_cast<std::size_t>(bytes_of(cache_.batch, most)));  // one head of all sequences
  for (const TokenRows* rows : arrays) {
    if (shares_rows(cache_) && (rows == &cache_.value.tokens || rows == &cache_.value.scales)) continue;
    for (std::int64_t head = 0; rows->data && used > 0 && head < cache_.num_kv_heads; ++head) {
      const auto bytes = static_cast<std::size_t>(used * rows->row);
      const auto at = [&](std::int64_t b) { return rows->data + b * rows->batch + head * rows->head; };
      const auto kept = [&](std::int64_t b) { return copy.data() + b * most; };
      for (std::int64_t b = 0; b < cache_.batch; ++b)
        if (index[b] != b) std::memcpy(kept(b), at(index[b]), bytes);
      for (std::int64_t b = 0; b < cache_.batch; ++b)
        if (index[b] != b) std::memcpy(at(b), kept(b), bytes);
    }
  }
  for (std::int64_t b = 0; b < cache_.batch; ++b) after_[b] = lengths_[index[b]];
  std::copy_n(starts_, cache_.batch, lengths_);
  for (std::int64_t b = 0; b < cache_.batch; ++b) starts_[b] = lengths_[index[b]];
  commit();
}

void CacheStep::truncate(const char* function, const std::int64_t* lengths) const {
  for (std::int64_t b = 0; b < cache_.batch; ++b)
    check_cut(function, "lengths"_arg, " holds ", {b, starts_[b], lengths_[b], lengths[b]}, source_.store->window);
  for (std::int64_t b = 0; b < cache_.batch; ++b)
    if (lengths[b] == 0) starts_[b] = 0;
  set(lengths, starts_);
}

void CacheStep::set(const std::int64_t* lengths, const std::int64_t* starts) const {
  std::copy_n(lengths, cache_.batch, after_);
  std::copy_n(starts, cache_.batch, starts_);
  commit();
}

}  // namespace selfattn
