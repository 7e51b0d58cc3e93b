#include "fuzz_shapes.h"

#include <algorithm>

namespace selfattn::native {
namespace {

// The last axes of q, k or v.
struct LastAxes {
  std::int64_t heads, length, dim;
};

Extents operand_shape(Bytes& bytes, const Sizes& s, int ndim, const LastAxes& last, bool bshd) {
  if (ndim == 2) return {last.length, last.dim};
  Extents shape(s.batch.end() - (ndim - 3), s.batch.end());
  for (std::int64_t& extent : shape)
    if (bytes.next() % 4 == 1) extent = 1;
  shape.insert(shape.end(), {bshd ? last.length : last.heads, bshd ? last.heads : last.length, last.dim});
  return shape;
}

Extents broadcast_batch(const Shapes& shapes) {
  Extents batch;
  for (const Name name : {q, k, v})
    for (std::size_t i = 3; i < shapes.of[name].size(); ++i) {
      const std::size_t from_end = i - 3;
      if (batch.size() <= from_end) batch.resize(from_end + 1, 1);
      const std::int64_t extent = shapes.of[name][shapes.of[name].size() - 1 - i];
      if (extent != 1) batch[from_end] = extent;
    }
  std::reverse(batch.begin(), batch.end());
  return batch;
}

// A shape that broadcasts to `target`: some leading axes are missing, and some others have extent 1.
Extents broadcasting(Bytes& bytes, const Extents& target) {
  const auto missing = bytes.next() % 4 == 1 ? bytes.below(static_cast<std::int64_t>(target.size()) + 1) : 0;
  Extents shape(target.begin() + missing, target.end());
  for (std::int64_t& extent : shape)
    if (bytes.next() % 4 == 1) extent = 1;
  return shape;
}

}  // namespace

Sizes read_sizes(Bytes& bytes) {
  Sizes s{};
  constexpr int ranks[] = {4, 4, 3, 2, 5};
  for (int& ndim : s.ndim) ndim = bytes.one_of(ranks);
  s.batch.resize(static_cast<std::size_t>(std::max(*std::max_element(s.ndim, s.ndim + 3) - 3, 0)));
  for (std::int64_t& extent : s.batch) extent = bytes.one_of({1, 2, 3, 1, 2, 0});
  s.kv_heads = bytes.one_of({1, 2, 3, 1, 2, 0});
  s.group = bytes.one_of({1, 2, 3, 4, 7});
  if (s.ndim[k] == 2 || s.ndim[v] == 2 || s.ndim[q] == 2) s.kv_heads = 1;
  if (s.ndim[q] == 2) s.group = 1;
  constexpr std::int64_t lengths[] = {8, 40, 130, 3300};
  // A number in 0..n. A zero byte gives 1, so that a short input has no empty axis.
  const auto up_to = [&](std::int64_t n) { return (bytes.below(n + 1) + 1) % (n + 1); };
  s.q_len = up_to(bytes.one_of(lengths) / 8 + 8);
  s.kv_len = up_to(bytes.one_of(lengths));
  s.head_dim = 1 + bytes.below(bytes.one_of({8, 40, 200}));
  s.value_dim = up_to(bytes.one_of({8, 40, 200}));
  return s;
}

void read_claims(Bytes& bytes, Sizes& s) {
  std::int64_t* const claimable[] = {
      &s.q_len, &s.kv_len, &s.kv_heads, &s.group, &s.head_dim, &s.value_dim, s.batch.empty() ? &s.q_len : &s.batch[0]};
  for (int i = 0; i < 3; ++i)
    *bytes.one_of(claimable) = std::max<std::int64_t>((std::int64_t{1} << bytes.below(62)) - bytes.below(3), 0);
  s.head_dim = std::max<std::int64_t>(s.head_dim, 1);
}

void read_shapes(Bytes& bytes, const Sizes& s, const AttentionArguments& options, Shapes& shapes) {
  const bool bshd = options.layout == selfattn::Layout::bshd;
  const std::int64_t heads = s.kv_heads * s.group;
  shapes.of[q] = operand_shape(bytes, s, s.ndim[q], {heads, s.q_len, s.head_dim}, bshd);
  shapes.of[k] = operand_shape(bytes, s, s.ndim[k], {s.kv_heads, s.kv_len, s.head_dim}, bshd);
  shapes.of[v] = operand_shape(bytes, s, s.ndim[v], {s.kv_heads, s.kv_len, s.value_dim}, bshd);
  const Extents batch = broadcast_batch(shapes);
  Extents scores = batch, per_head = batch;
  if (*std::max_element(s.ndim, s.ndim + 3) > 2) scores.push_back(heads);
  scores.insert(scores.end(), {s.q_len, s.kv_len});
  per_head.push_back(heads);
  const Extents per_batch = batch.empty() ? Extents{1} : batch;
  const int wanted = bytes.next();
  for (int name = mask; name < public_names; ++name) shapes.present[name] = wanted >> (name - mask) & 1;
  for (const Name name : {mask, bias}) {
    Extents target = scores;
    if (name == mask && options.recent_mask) target.back() = s.q_len;
    shapes.of[name] = broadcasting(bytes, target);
  }
  for (const Name name : {q_offset, q_lens, kv_lens}) shapes.of[name] = broadcasting(bytes, per_batch);
  shapes.of[alibi_slopes] = broadcasting(bytes, per_head);
  shapes.of[sinks] = {heads};
  if (shapes.present[kv_starts]) shapes.of[kv_starts] = broadcasting(bytes, per_batch);
}

void spoil(Bytes& bytes, Extents& shape) {
  if (shape.empty() || bytes.next() % 4 == 3) {
    bytes.flag() && !shape.empty() ? shape.erase(shape.begin()) : shape.insert(shape.begin(), bytes.below(4));
    return;
  }
  std::int64_t& extent = shape[static_cast<std::size_t>(bytes.below(static_cast<std::int64_t>(shape.size())))];
  extent =
      bytes.one_of({extent + 1, std::max<std::int64_t>(extent - 1, 0), std::int64_t{0}, std::int64_t{1}, 2 * extent});
}

bool expressible(const Extents& shape) {
  std::int64_t bytes = 8;
  for (const std::int64_t n : shape)
    if (n > 0 && __builtin_mul_overflow(bytes, n, &bytes)) return false;
  return true;
}

bool affordable(const Sizes& s, const Shapes& shapes) {
  double entries = 1;
  for (const std::int64_t n : broadcast_batch(shapes)) entries *= static_cast<double>(n);
  for (const std::int64_t n : {s.kv_heads, s.group, s.q_len + 1, s.kv_len + 1}) entries *= static_cast<double>(n);
  return entries * static_cast<double>(s.head_dim + s.value_dim + 2) <= 1e6;
}

}  // namespace selfattn::native
