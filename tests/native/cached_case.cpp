#include "cached_case.h"

#include <algorithm>
#include <cmath>

namespace selfattn::native {
namespace {

constexpr std::int32_t nowhere = -1;

std::int64_t integer(const Array& array, std::int64_t sequence) {
  std::int64_t n;
  std::memcpy(&n, array.at(array.count() == 1 ? 0 : sequence), sizeof n);
  return n;
}

// Computes the codes of the row whose first element is at `position`, and returns their scale. 8-bit codes are computed
// independently of the core.
float quantise(const Array& from, std::int64_t position, std::int64_t width, DType dtype, char* words) {
  if (dtype != DType::i8) {
    std::vector<float> row(static_cast<std::size_t>(width));
    for (std::int64_t d = 0; d < width; ++d)
      row[static_cast<std::size_t>(d)] = static_cast<float>(from.number(position + d));
    return element_type(dtype).quantise(row.data(), width, words);
  }
  double largest = 0;
  for (std::int64_t d = 0; d < width; ++d) largest = std::max(largest, std::fabs(from.number(position + d)));
  const float scale = static_cast<float>(largest / 127);
  for (std::int64_t d = 0; d < width; ++d) {
    const double code = scale == 0 ? 0 : std::nearbyint(from.number(position + d) / static_cast<double>(scale));
    words[d] = static_cast<char>(static_cast<std::int8_t>(std::clamp(code, -127.0, 127.0)));
  }
  return scale;
}

test::GuardedMemory not_a_number(std::int64_t bytes, std::int64_t pieces) {
  const auto count = static_cast<std::size_t>(pieces), size = static_cast<std::size_t>(bytes);
  test::GuardedMemory memory(size, count);
  for (std::size_t i = 0; i < count; ++i) std::memset(memory.data() + i * memory.stride(), 0xff, size);
  return memory;
}

std::int64_t stride_of(const test::GuardedMemory& memory) { return static_cast<std::int64_t>(memory.stride()); }

}  // namespace

bool cacheable(const Case& c) {
  const Extents &k = c.k.shape(), &v = c.v.shape(), &q = c.q.shape();
  if (k.size() != 4 || v.size() != 4 || q.size() > 4 || k[0] != v[0]) return false;
  return q.size() < 4 || q[0] == 1 || q[0] == k[0];
}

Array coded(const Array& from, DType codes) {
  Array to(DType::f64, from.shape());
  const std::int64_t width = from.shape().back(), rows = width == 0 ? 0 : from.count() / width;
  const ElementType& type = element_type(codes);
  std::vector<char> words(static_cast<std::size_t>(row_bytes(codes, width)));
  std::vector<double> numbers(static_cast<std::size_t>(words_of(codes, width) * type.elements));
  for (std::int64_t row = 0; row < rows; ++row) {
    const double scale = static_cast<double>(quantise(from, row * width, width, codes, words.data()));
    for (std::int64_t i = 0; i < words_of(codes, width); ++i)
      type.read(words.data() + i * type.bytes, numbers.data() + i * type.elements);
    for (std::int64_t d = 0; d < width; ++d)
      store(to.at(row * width + d), DType::f64, numbers[static_cast<std::size_t>(d)] * scale);
  }
  return to;
}

CachedCase::CachedCase(const Case& c, const Store& store)
    : case_(c),
      store_(store),
      batch_(c.k.shape()[0]),
      heads_(c.k.shape()[c.options.layout == selfattn::Layout::bshd ? 2 : 1]),
      length_(c.k.shape()[c.options.layout == selfattn::Layout::bshd ? 1 : 2]),
      dtype_(store.codes.value_or(c.k.dtype())) {
  if (paged()) {
    give_pages();
  } else {
    slots_ = store.ring ? 1 : length_;
    for (std::int64_t b = 0; store.ring && b < batch_; ++b) slots_ = std::max(slots_, end_of(b) - start_of(b));
    places_ = batch_;
  }
  fill(key_, c.k);
  fill(value_, c.v);
}

std::int64_t CachedCase::end_of(std::int64_t sequence) const {
  return case_.kv_lens ? integer(case_.kv_lens, sequence) : length_;
}

std::int64_t CachedCase::start_of(std::int64_t sequence) const {
  return case_.kv_starts ? std::min(integer(case_.kv_starts, sequence), end_of(sequence)) : 0;
}

std::int32_t* CachedCase::entries_of(std::int64_t sequence) const {
  return reinterpret_cast<std::int32_t*>(table_->data()) + sequence * runs_;
}

// Gives a page to each run that holds a key, but no page to other runs.
void CachedCase::give_pages() {
  slots_ = store_.page_size;
  runs_ = (length_ + slots_ - 1) / slots_;
  table_.emplace(static_cast<std::size_t>(batch_ * runs_) * sizeof(std::int32_t));
  for (std::int64_t b = 0; b < batch_; ++b) {
    const std::int64_t first = std::min(start_of(b) / slots_, std::max<std::int64_t>(runs_ - 1, 0));
    tables_.push_back({entries_of(b) + first, first});
  }
  std::vector<std::int32_t*> held;
  for (std::int64_t b = 0; b < batch_; ++b)
    for (std::int64_t run = 0; run < runs_; ++run) {
      std::int32_t& entry = entries_of(b)[run];
      entry = nowhere;
      if (run * slots_ < end_of(b) && (run + 1) * slots_ > start_of(b)) held.push_back(&entry);
    }
  Random random(store_.seed);
  for (std::size_t i = held.size(); i > 1; --i)
    std::swap(held[i - 1], held[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
  places_ = 1;  // page 0 belongs to no sequence
  for (std::int32_t* entry : held) *entry = static_cast<std::int32_t>(places_++);
}

void CachedCase::fill(Side& side, const Array& from) {
  side.width = from.shape().back();
  side.rows.emplace(not_a_number(slots_ * row_bytes(dtype_, side.width), places_ * heads_));
  if (store_.codes) side.scales.emplace(not_a_number(slots_ * size_of(DType::f32), places_ * heads_));
  describe(side);
  for (std::int64_t b = 0; b < batch_; ++b)
    for (std::int64_t key = start_of(b); key < end_of(b); ++key) {
      const std::int64_t page = paged() ? entries_of(b)[key / slots_] : b;
      for (std::int64_t head = 0; head < heads_; ++head) {
        const std::int64_t row = case_.options.layout == selfattn::Layout::bshd ? (b * length_ + key) * heads_ + head
                                                                                : (b * heads_ + head) * length_ + key;
        write_row(side, from, row * side.width, (page * heads_ + head) * slots_ + key % slots_);
      }
    }
}

// `position`: the position of the row's first element in the array. `place`: the number of slots before the row.
void CachedCase::write_row(const Side& side, const Array& from, std::int64_t position, std::int64_t place) const {
  const std::int64_t size = size_of(dtype_), piece = place / slots_, slot = place % slots_;
  char* to = side.rows->data() + piece * stride_of(*side.rows) + slot * row_bytes(dtype_, side.width);
  if (!store_.codes) {
    for (std::int64_t d = 0; d < side.width; ++d)
      std::memcpy(to + d * size, from.at(position + d), static_cast<std::size_t>(size));
    return;
  }
  const float scale = quantise(from, position, side.width, dtype_, to);
  std::memcpy(side.scales->data() + piece * stride_of(*side.scales) + slot * size_of(DType::f32), &scale, sizeof scale);
}

void CachedCase::describe(Side& side) const {
  const std::size_t head = case_.options.layout == selfattn::Layout::bshd ? 2 : 1,
                    key = case_.options.layout == selfattn::Layout::bshd ? 1 : 2;
  const std::int64_t stride = stride_of(*side.rows);
  side.shape[0] = side.scale_shape[0] = batch_;
  side.shape[head] = side.scale_shape[1] = heads_;
  side.shape[key] = side.scale_shape[2] = length_;
  side.shape[3] = side.width;
  side.strides[0] = paged() ? 0 : heads_ * stride;
  side.strides[head] = stride;
  side.strides[key] = row_bytes(dtype_, side.width);
  side.strides[3] = size_of(dtype_);
  if (!side.scales) return;
  const std::int64_t scale_stride = stride_of(*side.scales);
  side.scale_strides[0] = paged() ? 0 : heads_ * scale_stride;
  side.scale_strides[1] = scale_stride;
  side.scale_strides[2] = size_of(DType::f32);
}

AttentionArguments CachedCase::arguments() const {
  AttentionArguments a = case_.arguments();
  a.k = {key_.rows->data(), dtype_, 4, key_.shape, key_.strides};
  a.v = {value_.rows->data(), dtype_, 4, value_.shape, value_.strides};
  if (paged() || store_.ring) a.pages.size = slots_;
  if (paged()) {
    a.pages.tables = tables_.data();
    a.key_page = heads_ * stride_of(*key_.rows);
    a.value_page = heads_ * stride_of(*value_.rows);
  }
  if (!store_.codes) return a;
  a.key_scales = {key_.scales->data(), DType::f32, 3, key_.scale_shape, key_.scale_strides};
  a.value_scales = {value_.scales->data(), DType::f32, 3, value_.scale_shape, value_.scale_strides};
  if (paged()) {
    a.key_scale_page = heads_ * stride_of(*key_.scales);
    a.value_scale_page = heads_ * stride_of(*value_.scales);
  }
  return a;
}

}  // namespace selfattn::native
