#include "distance_terms.h"

#include <algorithm>
#include <limits>

#include "carver.h"
#include "rows.h"

namespace selfattn {
namespace {

// The rows of a span that belong to one head: every `heads`-th row from `row` on. They belong to consecutive
// queries, from `query` on.
struct HeadRows {
  std::int64_t head, row, query, count;
};

HeadRows rows_of(const RowSpan& span, std::int64_t i) {
  const std::int64_t row = (i - span.first % span.heads + span.heads) % span.heads;
  return {span.first_head + i, row, (span.first + row) / span.heads,
          row < span.valid ? ceil_div(span.valid - row, span.heads) : 0};
}

// Whether causal or window hides all keys at distances in [least, most].
bool out_of_sight(const Problem& problem, std::int64_t least, std::int64_t most) {
  const VisibleDistances visible = visible_distances(problem);
  return (visible.least && !problem.prefix_lens && most < *visible.least) || (visible.most && least > *visible.most);
}

// Packs the vectors of the distances `distance`, `distance` - 1, ... as the columns of one panel.
void pack(const Problem& problem, const RelativeProducts& relative, const DistanceMemory& memory, std::int64_t head,
          std::int64_t distance) {
  const PerHead& rows = problem.relative.rows;
  const int width = relative.types->panel_columns;
  const std::int64_t row_bytes = problem.head_dim * size_of(rows.dtype);
  for (int i = 0; i < width; ++i) {
    const char* row = problem.relative.at(head, distance - i);
    memory.vectors[i] = row;
    if (!relative.copies) {
      const char* next = problem.relative.at(head, distance - i - width);
      for (std::int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(next + byte);
      continue;
    }
    char* copy = memory.copies + i * problem.head_dim * size_of(problem.dtype);
    gather_rows(*relative.kernels, copy, problem.dtype, {{row, 0, rows.column}, rows.dtype}, 1, problem.head_dim);
    memory.vectors[i] = copy;
  }
  relative.types->pack_panel(memory.vectors, problem.head_dim, memory.panel);
}

// The entry of the table of distance biases for a distance, converted to T. A finite entry stays finite.
template <class T>
T bias_at(const Problem& problem, std::int64_t head, std::int64_t distance) {
  const double x = read_real(problem.distance_bias.at(head, distance), DType::f64);
  return static_cast<T>(clamp_finite(x, std::numeric_limits<T>::max()));
}

}  // namespace

DistanceMemory take_distance_memory(Carver& carver, const Problem& problem, const RelativeProducts& relative,
                                    std::int64_t rows, std::int64_t keys) {
  const auto take_if = [&](bool needed, std::int64_t count) {
    return needed ? carver.take<char>(count * size_of(problem.dtype)) : nullptr;
  };
  DistanceMemory memory;
  const std::int64_t width = problem.relative ? relative.types->panel_columns : 0;
  memory.queries = take_if(width > 0, rows * problem.head_dim);
  memory.vectors = carver.take<const void*>(width);
  memory.copies = take_if(relative.copies, width * problem.head_dim);
  memory.panel = take_if(width > 0, width * problem.head_dim);
  memory.stride = width > 0 ? round_up(relative.keys + width - 1, width) : 0;
  memory.products = take_if(width > 0, rows * memory.stride);
  memory.bias_stride = keys + (problem.bias ? 0 : rows);
  const std::int64_t lines = problem.bias ? rows : std::min(problem.group_size, rows);
  memory.biases = take_if(static_cast<bool>(problem.distance_bias), lines * memory.bias_stride);
  return memory;
}

DistanceTerms::DistanceTerms(const Problem& problem, const RelativeProducts& relative, const RowSpan& span, Row* rows,
                             const DistanceMemory& memory)
    : problem_(problem),
      relative_(relative),
      span_(span),
      rows_(rows),
      memory_(memory),
      offset_(problem.offset_of(span.batch)) {
  if (!problem.relative) return;
  const std::int64_t size = size_of(problem.dtype);
  for (int i = 0; i < span.valid; ++i)
    gather_query(problem, *relative.kernels, span, i, problem.relative_bias,
                 {memory.queries + i * problem.head_dim * size, size, problem.dtype});
}

void DistanceTerms::prepare(std::int64_t first, int count, std::int64_t end) {
  if (problem_.relative && first >= made_) {
    made_ = std::min(first + relative_.keys, end);
    multiply(first, made_ - first);
  }
  if (!problem_.distance_bias) return;
  with_type(problem_.dtype,
            [&]<class T> { problem_.bias ? add_biases<T>(first, count) : fill_biases<T>(first, count); });
}

// Multiplies each query by the vectors of the distances to its keys. The distance i + offset - j of query i and key j
// falls by 1 from key to key and grows by 1 from query to query. `width` (panel_columns) consecutive queries form a
// band, which is multiplied by all panels of distances that any of these queries needs:
//
//   column c of a band: distance d - c, where d is the distance from query width - 1 of the band to key `first`
//   query n of a band: its products start at column width - 1 - n, which belongs to key `first`
//
// Consecutive bands need the same panels, shifted by one, so each panel is packed once for all bands.
void DistanceTerms::multiply(std::int64_t first, std::int64_t count) {
  const std::int64_t width = relative_.types->panel_columns, size = size_of(problem_.dtype), depth = problem_.head_dim;
  const std::int64_t group = span_.heads, panels = ceil_div(count + width - 1, width);
  for (std::int64_t i = 0; i < group; ++i) {
    const HeadRows rows = rows_of(span_, i);
    const std::int64_t bands = ceil_div(rows.count, width);
    const std::int64_t farthest = rows.query + offset_ + bands * width - 1 - first;
    for (std::int64_t panel = 0; panel < panels + bands - 1 && rows.count > 0; ++panel) {
      const std::int64_t distance = farthest - panel * width;
      if (out_of_sight(problem_, distance - width + 1, distance)) continue;
      pack(problem_, relative_, memory_, rows.head, distance);
      for (std::int64_t band = 0; band < bands; ++band) {
        const std::int64_t index = panel - (bands - 1 - band), row = rows.row + band * width * group;
        if (index < 0 || index >= panels) continue;
        relative_.types->of(problem_.dtype)
            .project({memory_.queries + row * depth * size, group * depth, std::min(width, rows.count - band * width),
                      depth, memory_.panel, nullptr, memory_.products + (row * memory_.stride + index * width) * size,
                      group * memory_.stride, static_cast<int>(width)});
      }
    }
    for (std::int64_t n = 0; n < rows.count; ++n) {
      const std::int64_t row = rows.row + n * group, own = width - 1 - n % width;
      rows_[row].relative = memory_.products + (row * memory_.stride + own - first) * size;
    }
  }
}

// Fills one line of biases per head. The head's queries share the line: the biases of the last query start at the
// line's first element, the biases of the last but one at the second element, and so on.
template <class T>
void DistanceTerms::fill_biases(std::int64_t first, int count) const {
  for (std::int64_t i = 0; i < span_.heads; ++i) {
    const HeadRows rows = rows_of(span_, i);
    if (rows.count == 0) continue;
    T* line = reinterpret_cast<T*>(memory_.biases) + rows.row * memory_.bias_stride;
    const std::int64_t last = rows.query + rows.count - 1;
    for (std::int64_t n = 0; n < count + rows.count - 1; ++n)
      line[n] = bias_at<T>(problem_, rows.head, last + offset_ - first - n);
    for (std::int64_t n = 0; n < rows.count; ++n)
      rows_[rows.row + n * span_.heads].bias =
          reinterpret_cast<char*>(line) + (rows.count - 1 - n - first) * static_cast<std::int64_t>(sizeof(T));
  }
}

// The caller's bias differs between rows, so each row has a line of its own, with the sum of both biases.
template <class T>
void DistanceTerms::add_biases(std::int64_t first, int count) const {
  const double hidden = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < span_.heads; ++i) {
    const HeadRows rows = rows_of(span_, i);
    for (std::int64_t n = 0; n < rows.count; ++n) {
      const std::int64_t row = rows.row + n * span_.heads, query = rows.query + n;
      const char* bias = problem_.at(problem_.bias, span_.batch) + rows.head * problem_.bias.head +
                         query * problem_.bias.row + first * problem_.bias.column;
      T* line = reinterpret_cast<T*>(memory_.biases) + row * memory_.bias_stride;
      for (int j = 0; j < count; ++j) {
        const double given = read_real(bias + j * problem_.bias.column, problem_.bias.dtype);
        const T own = bias_at<T>(problem_, rows.head, query + offset_ - first - j);
        line[j] = static_cast<T>(given == hidden || static_cast<double>(own) == hidden ? hidden : given + own);
      }
      rows_[row].bias = reinterpret_cast<char*>(line) - first * static_cast<std::int64_t>(sizeof(T));
    }
  }
}

}  // namespace selfattn
