#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rows.h"

namespace selfattn {
namespace {

// Codes -127..127 and the scale that gives the numbers back: code * scale. What is not finite makes the whole row NaN.
float quantise(const float* x, std::int64_t count, char* codes) {
  float largest = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    const float size = std::abs(x[i]);
    finite = finite && size <= std::numeric_limits<float>::max();
    largest = std::max(largest, size);
  }
  constexpr float most = 127;
  float scale = largest / most;
  // The largest floats would come back as infinite.
  if (scale * most > std::numeric_limits<float>::max()) scale = std::nextafter(scale, 0.0f);
  if (!finite || scale == 0) {
    std::memset(codes, 0, static_cast<std::size_t>(count));
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const float code = std::clamp(std::nearbyint(x[i] / scale), -most, most);
    const auto byte = static_cast<std::int8_t>(code);
    std::memcpy(codes + i, &byte, 1);
  }
  return scale;
}

// A contiguous row of any type to floats.
void to_floats(const KernelSet& kernels, const char* from, DType type, std::int64_t count, char* to) {
  if (type != DType::f64) return gather_rows(kernels, to, DType::f32, from, type, 0, size_of(type), 1, count);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto x = static_cast<float>(read_real(from + i * size_of(type), type));
    std::memcpy(to + i * size_of(DType::f32), &x, sizeof x);
  }
}

// Where the rows of one sequence and KV head stand.
struct Place {
  const Pages& pages;
  const TokenRows& rows;
  std::int64_t sequence, kv_head;

  char* of(std::int64_t token) const {
    return rows.data + sequence * rows.batch + kv_head * rows.head +
           pages.offset(pages.of(sequence), token, rows.page, rows.row);
  }
};

// Brings each row, turned, to row_for(b, h, t), contiguous and in its own type, then calls use(b, h, t).
template <class RowFor, class Use>
void each_row(const Tokens& tokens, const Turn& turn, RowFor row_for, Use use) {
  const std::int64_t size = size_of(tokens.dtype);
  double* sines = turn.rope ? turn.tables + turn.rope->rotary_dim / 2 : nullptr;
  for (std::int64_t b = 0; b < tokens.batch; ++b)
    for (std::int64_t t = 0; t < tokens.count; ++t) {
      if (turn.rope) rope_tables(*turn.rope, turn.position(b, t), turn.tables, sines);
      for (std::int64_t h = 0; h < tokens.heads; ++h) {
        const char* from = tokens.data + b * tokens.batch_step + h * tokens.head_step + t * tokens.row_step;
        char* row = row_for(b, h, t);
        if (turn.rope)
          rope_rotate(*turn.rope, tokens.dtype, tokens.width, turn.tables, sines, from, tokens.column_step, row, size);
        else
          copy_rows(row, 0, size, from, 0, tokens.column_step, 1, tokens.width, size);
        use(b, h, t);
      }
    }
}

}  // namespace

CachedKeys::CachedKeys(const Cache& cache, const std::int64_t* lengths)
    : cache_(cache), lengths_(lengths), count_(cache.batch) {
  for (std::int64_t b = 0; b < cache.batch; ++b) longest_ = std::max(longest_, lengths[b]);
}

TensorView CachedKeys::tokens(View& view, const Cache::Side& side, bool bshd) const {
  const TokenRows& rows = side.tokens;
  const int head = bshd ? 2 : 1, row = bshd ? 1 : 2;
  view.shape[0] = cache_.batch;
  view.shape[head] = cache_.num_kv_heads;
  view.shape[row] = longest_;
  view.shape[3] = side.width;
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

void CachedKeys::place(AttentionArguments& arguments) {
  arguments.k = tokens(keys_, cache_.key, arguments.bshd);
  arguments.v = tokens(values_, cache_.value, arguments.bshd);
  arguments.pages = cache_.pages;
  arguments.key_page = cache_.key.tokens.page;
  arguments.value_page = cache_.value.tokens.page;
  arguments.key_scales = scales(key_scales_, cache_.key.scales);
  arguments.value_scales = scales(value_scales_, cache_.value.scales);
  arguments.key_scale_page = cache_.key.scales.page;
  arguments.value_scale_page = cache_.value.scales.page;
  arguments.kv_lens = {const_cast<std::int64_t*>(lengths_), DType::i64, 1, &count_, &step_};
  arguments.kv_starts = cache_.starts;
  arguments.keys = Keys::cached;
}

std::int64_t Turn::position(std::int64_t sequence, std::int64_t token) const {
  if (!positions) return first[sequence] + token;
  const char* p = static_cast<const char*>(positions.data);
  if (positions.extent(0) != 1) p += token * positions.stride(0);
  if (positions.ndim > 1 && positions.extent(1) != 1) p += sequence * positions.stride(1);
  std::int64_t position;
  std::memcpy(&position, p, sizeof position);
  return position;
}

void turn_tokens(const Tokens& tokens, const Turn& turn, char* to) {
  const std::int64_t bytes = tokens.width * size_of(tokens.dtype);
  each_row(
      tokens, turn,
      [&](std::int64_t b, std::int64_t h, std::int64_t t) {
        return to + ((b * tokens.heads + h) * tokens.count + t) * bytes;
      },
      [](std::int64_t, std::int64_t, std::int64_t) {});
}

void store_tokens(const KernelSet& kernels, const Cache& cache, const Cache::Side& side, const Tokens& tokens,
                  const Turn& turn, char* row) {
  const std::int64_t width = tokens.width;
  char* floats = row + width * size_of(DType::f64);
  const auto in_row = [row](std::int64_t, std::int64_t, std::int64_t) { return row; };
  each_row(tokens, turn, in_row, [&](std::int64_t b, std::int64_t h, std::int64_t t) {
    const std::int64_t token = cache.lengths[b] + t;
    char* to = Place{cache.pages, side.tokens, b, h}.of(token);
    if (tokens.dtype == cache.dtype) {
      std::memcpy(to, row, static_cast<std::size_t>(width * size_of(cache.dtype)));
    } else if (cache.dtype == DType::f64) {
      gather_rows(kernels, to, cache.dtype, row, tokens.dtype, 0, size_of(tokens.dtype), 1, width);
    } else {
      to_floats(kernels, row, tokens.dtype, width, floats);
      if (cache.dtype == DType::i8) {
        const float scale = quantise(reinterpret_cast<const float*>(floats), width, to);
        std::memcpy(Place{cache.pages, side.scales, b, h}.of(token), &scale, sizeof scale);
      } else {
        scatter_row(kernels, to, cache.dtype, size_of(cache.dtype), floats, DType::f32, width);
      }
    }
  });
}

}  // namespace selfattn
