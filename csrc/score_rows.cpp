#include "score_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"

namespace selfattn {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

double base2(double x) { return x * log2_e; }

// Clamps a finite number so that it stays finite in the type of computation, even in sums.
double within_range(double x, DType dtype) { return clamp_finite(x, largest_number(dtype) / 4); }

double slope_of(const Problem& problem, std::int64_t batch, std::int64_t head) {
  const double slope =
      read_real(problem.at(problem.alibi_slopes, batch) + head * problem.alibi_slopes.head, DType::f64);
  // The product of slope and distance must stay finite for any distance.
  constexpr double farthest = 1e12;
  return std::isfinite(slope) ? within_range(slope * farthest, problem.dtype) / farthest : slope;
}

// The threshold must fit a 32-bit word. So at rates that would round to 1, a few weights are still kept.
Dropout dropout_of(const Problem& problem) {
  if (problem.dropout == 0) return {};
  const double most = std::numeric_limits<std::uint32_t>::max();
  const double threshold = std::min(std::nearbyint(std::ldexp(problem.dropout, 32)), most);
  return {1 / (1 - problem.dropout), static_cast<std::uint32_t>(threshold), problem.seed, problem.first_key};
}

// Short calls spend several percent of their time here, so all of it is inlined into the loop over rows.
inline void fill(Row& row, const Problem& problem, const RowSpan& span, RowIndex index, const ValidKeys& valid) {
  const KeyRange visible = visible_keys(index.query, valid);
  row.query = row.relative = nullptr;
  row.out = row.scores = nullptr;
  row.mask = problem.mask ? reinterpret_cast<std::uint8_t*>(element(problem, problem.mask, span, index)) : nullptr;
  row.bias = problem.bias ? element(problem, problem.bias, span, index) : nullptr;
  row.key_begin = visible.begin;
  row.key_end = visible.end;
  // A constant added to all scores of a row cancels in softmax, but the differences between the scores are lost to
  // rounding if the constant is large. So ALiBi distances are counted from the visible key nearest to the query's
  // position, and `omitted` is the constant that this change adds to all scores of the row. It is subtracted from lse.
  // A sink has no distance, so the change would not add the constant to the sink's score. With sinks, distances are
  // therefore counted from the query's position.
  const std::int64_t position = index.query + valid.offset;
  row.position =
      problem.sinks ? position : std::clamp(position, visible.begin, std::max(visible.begin, visible.end - 1));
  row.slope = problem.alibi_slopes ? slope_of(problem, span.batch, index.head) : 0;
  row.omitted = row.slope == 0 ? 0 : base2(row.slope * std::abs(static_cast<double>(position - row.position)));
  row.sink = problem.sinks ? sink_of(problem, index.head) : -infinity;
  const std::int64_t numbers[] = {problem.first_entry + span.batch, problem.first_head + index.head,
                                  problem.first_query + index.query};
  for (int i = 0; i < 3; ++i) row.coordinates[i] = static_cast<std::uint32_t>(numbers[i]);
}

}  // namespace

RowSpan make_span(const Problem& problem, std::int64_t batch, std::int64_t first_head, std::int64_t heads,
                  std::int64_t first, std::int64_t most) {
  const auto within = [&](std::int64_t queries) {
    return static_cast<int>(std::clamp<std::int64_t>(queries * heads - first, 0, most));
  };
  return {batch, first_head, heads, first, within(problem.q_len), within(problem.queries_of(batch))};
}

KeyRange span_keys(const Problem& problem, const RowSpan& span) {
  if (span.valid == 0) return {0, 0};
  const ValidKeys valid = valid_keys(problem, span.batch);
  // Both ends of a query's visible keys are monotonic in the query.
  const KeyRange first = visible_keys(row_index(span, 0).query, valid);
  const KeyRange last = visible_keys(row_index(span, span.valid - 1).query, valid);
  // The range of a query that sees nothing may begin before the first valid key, where keys may be in no page.
  const std::int64_t begin = std::max(std::min(first.begin, last.begin), valid.begin);
  return common({begin, std::max(first.end, last.end)}, problem.held);
}

const std::uint8_t* mask_of(const Problem& problem, const RowSpan& span, RowIndex index) {
  return problem.mask ? reinterpret_cast<std::uint8_t*>(element(problem, problem.mask, span, index)) : nullptr;
}

double sink_of(const Problem& problem, std::int64_t head) {
  if (!problem.sinks) return -infinity;
  const double sink = read_real(problem.sinks.data + head * problem.sinks.head, DType::f64);
  return within_range(base2(sink), problem.dtype);
}

Row describe_row(const Problem& problem, const RowSpan& span, RowIndex index, const ValidKeys& valid) {
  Row row;
  fill(row, problem, span, index, valid);
  return row;
}

void describe_rows(const Problem& problem, const RowSpan& span, Row* rows) {
  const ValidKeys valid = valid_keys(problem, span.batch);
  RowIndex index = row_index(span, 0);
  for (int i = 0; i < span.valid; ++i, index = next_row(span, index)) fill(rows[i], problem, span, index, valid);
}

void gather_query(const Problem& problem, const KernelSet& kernels, const RowSpan& span, std::int64_t i,
                  const PerHead& bias, const TargetRow& to) {
  const RowIndex index = row_index(span, i);
  const Operand& query = problem.query;
  const SourceRows row{{element(problem, query, span, index), 0, query.column}, query.dtype};
  gather_rows(kernels, to.data, to.dtype, row, 1, problem.head_dim);
  if (!bias) return;
  const char* added = bias.data + index.head * bias.head;
  with_type(to.dtype, [&]<class T> { add_doubles(reinterpret_cast<T*>(to.data), added, problem.head_dim); });
}

Scoring scoring_of(const Problem& problem) {
  Scoring scoring;
  // A cap that overflows the type has no effect.
  const bool capped = problem.softcap != 0 && std::isfinite(base2(problem.softcap)) &&
                      base2(problem.softcap) == within_range(base2(problem.softcap), problem.dtype);
  scoring.multiplier = capped ? problem.scale / problem.softcap : base2(problem.scale);
  scoring.softcap = capped ? base2(problem.softcap) : 0;
  scoring.alibi = static_cast<bool>(problem.alibi_slopes);
  scoring.mask = static_cast<bool>(problem.mask);
  scoring.mask_stride = problem.recent_mask ? 1 : problem.mask.column;
  scoring.bias = static_cast<bool>(problem.bias);
  scoring.bias_type = problem.bias.dtype;
  scoring.bias_stride = problem.bias.column;
  scoring.dropout = dropout_of(problem);
  if (problem.distance_bias) {
    scoring.bias = true;
    scoring.bias_type = problem.dtype;
    scoring.bias_stride = size_of(problem.dtype);
    scoring.bias_at_hand = true;
    scoring.toeplitz = problem.group_size == 1 && !problem.bias && !problem.mask;
  }
  return scoring;
}

}  // namespace selfattn
