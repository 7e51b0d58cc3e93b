#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "carver.h"
#include "rows.h"

namespace selfattn {
namespace {

// Converts a contiguous row of any type to floats.
void to_floats(const KernelSet& kernels, const char* from, DType type, std::int64_t count, char* to) {
  if (type != DType::f64) return gather_rows(kernels, to, DType::f32, {{from, 0, size_of(type)}, type}, 1, count);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto x = static_cast<float>(read_real(from + i * size_of(type), type));
    std::memcpy(to + i * size_of(DType::f32), &x, sizeof x);
  }
}

// The addresses of the rows of one sequence and KV head.
struct TokenAddress {
  const Pages& pages;
  const TokenRows& rows;
  std::int64_t sequence, kv_head;

  char* of(std::int64_t token) const {
    return rows.data + sequence * rows.batch + kv_head * rows.head +
           pages.offset(pages.of(sequence), token, rows.page, rows.row);
  }
};

}  // namespace

void check_cut(const char* function, const Argument& argument, const char* verb, const Cut& cut, std::int64_t window) {
  if (cut.kept < 0 || cut.kept > cut.length)
    refuse(function, argument, verb, cut.kept, ", which is outside 0..", cut.length, " (sequence ", cut.sequence, ")");
  if (cut.kept > 0 && cut.start > first_seen(cut.kept, window))
    refuse(function, argument, verb, cut.kept, ", but a window of ", window, " would then see tokens before ",
           cut.start, ", which sequence ", cut.sequence, " no longer holds");
}

CachedKeys::CachedKeys(const Cache& cache, const std::int64_t* lengths)
    : cache_(cache), lengths_(lengths), count_(cache.batch) {
  for (std::int64_t b = 0; b < cache.batch; ++b) longest_ = std::max(longest_, lengths[b]);
}

TensorView CachedKeys::tokens(View& view, const Cache::Rows& cached, Layout layout) const {
  const TokenRows& rows = cached.tokens;
  const int head = layout == Layout::bshd ? 2 : 1, row = 3 - head;
  view.shape[0] = cache_.batch;
  view.shape[head] = cache_.num_kv_heads;
  view.shape[row] = longest_;
  view.shape[3] = cached.width;
  view.strides[0] = rows.batch;
  view.strides[head] = rows.head;
  view.strides[row] = rows.row;
  view.strides[3] = size_of(cache_.dtype);
  return {rows.data, cache_.dtype, 4, view.shape, view.strides};
}

TensorView CachedKeys::scales(View& view, const TokenRows& rows) const {
  if (!rows.data) return {};
  view = {{cache_.batch, cache_.num_kv_heads, longest_, 0}, {rows.batch, rows.head, rows.row, 0}};
  return {rows.data, DType::f32, 3, view.shape, view.strides};
}

void CachedKeys::present(AttentionArguments& arguments) {
  arguments.k = tokens(keys_, cache_.key, arguments.layout);
  arguments.v = tokens(values_, cache_.value, arguments.layout);
  arguments.pages = cache_.pages;
  arguments.key_page = cache_.key.tokens.page;
  arguments.value_page = cache_.value.tokens.page;
  arguments.key_scales = scales(key_scales_, cache_.key.scales);
  arguments.value_scales = scales(value_scales_, cache_.value.scales);
  arguments.key_scale_page = cache_.key.scales.page;
  arguments.value_scale_page = cache_.value.scales.page;
  arguments.kv_lens = {const_cast<std::int64_t*>(lengths_), DType::i64, 1, &count_, &stride_};
  arguments.kv_starts = cache_.starts;
  arguments.cached = true;
}

TokensView::TokensView(const TensorView& tokens, Layout layout) : view{tokens.data, tokens.dtype, 4, shape, strides} {
  const int missing = 4 - tokens.ndim;
  for (int axis = 0; axis < 4; ++axis) {
    const int from = (layout == Layout::bshd || axis == 0 || axis == 3 ? axis : 3 - axis) - missing;
    shape[axis] = from < 0 ? 1 : tokens.shape[from];
    strides[axis] = from < 0 ? 0 : tokens.strides[from];
  }
}

TokenMemory::TokenMemory(char* base, std::int64_t width) {
  Carver carver{base};
  given = carver.take<char>(width * size_of(DType::f64));
  floats = carver.take<char>(width * size_of(DType::f32));
  bytes = carver.used;
}

void store_tokens(const KernelSet& kernels, const Cache& cache, const Cache::Rows& cached, const TensorView& tokens,
                  char* scratch) {
  const std::int64_t width = tokens.extent(0), heads = tokens.extent(1), count = tokens.extent(2);
  const TokenMemory row(scratch, width);
  const auto store_row = [&](std::int64_t b, std::int64_t t, std::int64_t h) {
    const std::int64_t token = cache.lengths[b] + t;
    const char* from =
        static_cast<const char*>(tokens.data) + b * tokens.stride(3) + t * tokens.stride(2) + h * tokens.stride(1);
    char* to = TokenAddress{cache.pages, cached.tokens, b, h}.of(token);
    const std::int64_t size = size_of(tokens.dtype);
    const bool converts = tokens.dtype != cache.dtype;
    copy_rows({converts ? row.given : to, 0, size}, {from, 0, tokens.stride(0)}, 1, width, size);
    if (!converts) return;
    if (cache.dtype == DType::f64)
      return gather_rows(kernels, to, cache.dtype, {{row.given, 0, size}, tokens.dtype}, 1, width);
    to_floats(kernels, row.given, tokens.dtype, width, row.floats);
    if (!is_scaled(cache.dtype))
      return scatter_row(kernels, {to, size_of(cache.dtype), cache.dtype}, row.floats, DType::f32, width);
    const float scale = element_type(cache.dtype).quantise(reinterpret_cast<const float*>(row.floats), width, to);
    std::memcpy(TokenAddress{cache.pages, cached.scales, b, h}.of(token), &scale, sizeof scale);
  };
  for (std::int64_t b = 0; b < cache.batch; ++b)
    for (std::int64_t t = 0; t < count; ++t)
      for (std::int64_t h = 0; h < heads; ++h) store_row(b, t, h);
}

}  // namespace selfattn
