#include "row_block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rows.h"

namespace selfattn {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

void fill_row(char* p, std::int64_t stride, std::int64_t count, double x, DType dtype) {
  for (std::int64_t i = 0; i < count; ++i) write_real(p + i * stride, x, dtype);
}

struct RowSums {
  double max, sum;
  bool undefined;  // the row sees a key, but its sum is 0
};

// Whether a row sees any key. If a row sees a key but all its scores are -inf, its result is NaN, as in IEEE
// arithmetic. A row that sees no key gets 0.
bool sees_a_key(const Problem& problem, const RowSpan& span, RowIndex index, const Row& row) {
  const std::uint8_t* mask = mask_of(problem, span, index);
  const char* bias = problem.bias ? element(problem, problem.bias, span, index) : nullptr;
  const std::int64_t masked_from = problem.masked_from(span.batch);
  const std::int64_t position = index.query + problem.offset_of(span.batch);
  for (std::int64_t j = row.key_begin; j < row.key_end; ++j) {
    if (mask && j >= masked_from && mask[(j - masked_from) * problem.mask.column] == 0) continue;
    if (bias && read_real(bias + j * problem.bias.column, problem.bias.dtype) == -infinity) continue;
    const ByDistance& distances = problem.distance_bias;
    if (distances && read_real(distances.at(index.head, position - j), DType::f64) == -infinity) continue;
    return true;
  }
  return false;
}

// Turns the scores of a row into weights, and adds these to `mass` if it is not null.
void finish_weights(const Problem& problem, const Plan& plan, const Row& row, const RowSums& sums, double* mass) {
  const std::int64_t size = size_of(problem.dtype), count = row.key_end - row.key_begin;
  char* weights = static_cast<char*>(row.scores) + row.key_begin * size;
  if (sums.undefined)
    fill_row(weights, size, count, std::numeric_limits<double>::quiet_NaN(), problem.dtype);
  else if (sums.sum == 0)
    std::memset(weights, 0, static_cast<std::size_t>(count * size));
  else
    plan.types->weigh(weights, count, sums.max, 1.0 / sums.sum);
  if (const Dropout dropout = scoring_of(problem).dropout)
    plan.types->drop(dropout, row, row.key_begin, count, weights);
  if (mass) plan.types->add(weights, count, mass + row.key_begin);
}

// Keys outside the row's range have no scores and get weight 0.
void clear_hidden_weights(const Problem& problem, const Row& row) {
  char* weights = static_cast<char*>(row.scores);
  const std::int64_t size = size_of(problem.dtype);
  std::memset(weights, 0, static_cast<std::size_t>(row.key_begin * size));
  std::memset(weights + row.key_end * size, 0, static_cast<std::size_t>((problem.kv_len - row.key_end) * size));
}

// Limits a row's keys to those that the operands hold. Nothing before or after them may be read.
void clip_row(Row& row, const KeyRange& held) {
  const KeyRange keys = common({row.key_begin, row.key_end}, held);
  row.key_begin = keys.begin;
  row.key_end = keys.end;
}

template <class T>
void merge(const Problem& problem, const Plan& plan, const Shared& shared, std::int64_t block, const RowSpan& span,
           const ThreadMemory& memory) {
  const std::int64_t ranges = ranges_of(plan, problem.keys_of(span.batch)).count;
  T* row_max = reinterpret_cast<T*>(memory.row_max);
  T* row_sum = reinterpret_cast<T*>(memory.row_sum);
  for (int i = 0; i < span.valid; ++i) {
    const Row& row = memory.rows[i];
    const double start = sink_of(problem, row_index(span, i).head);
    T peak = static_cast<T>(start);
    T sum = start == -infinity ? T(0) : T(1);
    T* out = static_cast<T*>(row.out);
    std::fill_n(out, problem.value_dim, T(0));
    for (std::int64_t r = 0; r < ranges; ++r) {
      const Partial part = shared.partial(plan, problem, block, r);
      const T part_max = reinterpret_cast<const T*>(part.row_max)[i];
      const T part_sum = reinterpret_cast<const T*>(part.row_sum)[i];
      if (part_sum == T(0)) continue;  // the range adds nothing to the row
      const T highest = part_max < peak ? peak : part_max;
      const T shift = highest == static_cast<T>(-infinity) ? T(0) : highest;
      const T keep = std::exp2(peak - shift), take = std::exp2(part_max - shift);
      const T* part_out = reinterpret_cast<const T*>(part.out) + i * problem.value_dim;
      for (std::int64_t d = 0; d < problem.value_dim; ++d) out[d] = out[d] * keep + part_out[d] * take;
      sum = sum * keep + part_sum * take;
      peak = highest;
    }
    row_max[i] = peak;
    row_sum[i] = sum;
    const T factor = sum == T(0) ? T(1) : T(1) / sum;
    for (std::int64_t d = 0; d < problem.value_dim; ++d) out[d] *= factor;
  }
}

// Where the sums of a batch entry's rows are kept.
template <class T>
struct Kept {
  const Operand& place;
  char *row_max, *row_sum, *sees_key;

  Kept(const Problem& problem, std::int64_t batch)
      : place(problem.running.row_max),
        row_max(problem.at(problem.running.row_max, batch)),
        row_sum(problem.at(problem.running.row_sum, batch)),
        sees_key(problem.at(problem.running.sees_key, batch)) {}

  T& number(char* numbers, RowIndex index) const {
    return *reinterpret_cast<T*>(numbers + index.head * place.head + index.query * place.row);
  }
};

template <class T>
void load(const Problem& problem, const RowSpan& span, const ThreadMemory& memory) {
  const Kept<T> kept(problem, span.batch);
  RowIndex index = row_index(span, 0);
  for (int i = 0; i < span.valid; ++i, index = next_row(span, index)) {
    reinterpret_cast<T*>(memory.row_max)[i] = kept.number(kept.row_max, index);
    reinterpret_cast<T*>(memory.row_sum)[i] = kept.number(kept.row_sum, index);
  }
}

template <class T>
void store(const Problem& problem, const RowSpan& span, const ThreadMemory& memory) {
  const Kept<T> kept(problem, span.batch);
  const Operand& flags = problem.running.sees_key;
  RowIndex index = row_index(span, 0);
  for (int i = 0; i < span.valid; ++i, index = next_row(span, index)) {
    const T sum = reinterpret_cast<const T*>(memory.row_sum)[i];
    kept.number(kept.row_max, index) = reinterpret_cast<const T*>(memory.row_max)[i];
    kept.number(kept.row_sum, index) = sum;
    char& sees_key = kept.sees_key[index.head * flags.head + index.query * flags.row];
    if (!problem.running.begun) sees_key = 0;
    if (sum == T(0) && sees_key == 0) sees_key = sees_a_key(problem, span, index, memory.rows[i]);
  }
}

}  // namespace

RowSpan span_of(const Problem& problem, const Plan& plan, std::int64_t batch, std::int64_t kv_head,
                std::int64_t row_block) {
  return make_span(problem, batch, kv_head * problem.group_size, problem.group_size, row_block * plan.block_rows,
                   plan.block_rows);
}

void describe_rows(const Problem& problem, const Plan& plan, const RowSpan& span, const ThreadMemory& memory,
                   bool with_sinks) {
  const std::int64_t size = size_of(problem.dtype);
  const char* query = problem.at(problem.query, span.batch);
  char* out = problem.at(problem.out, span.batch);
  describe_rows(problem, span, memory.rows);
  RowIndex index = row_index(span, 0);
  for (int i = 0; i < span.valid; ++i, index = next_row(span, index)) {
    Row& row = memory.rows[i];
    if (!with_sinks) row.sink = -infinity;
    row.query = query + index.head * problem.query.head + index.query * problem.query.row;
    if (plan.copies_queries) {
      const DType type = plan.attend->queries;
      char* copy = memory.queries + i * problem.head_dim * size_of(type);
      gather_query(problem, *plan.kernels, span, i, problem.key_bias, {copy, size_of(type), type});
      row.query = copy;
    }
    row.out = plan.copies_out ? memory.out + i * problem.value_dim * size
                              : out + index.head * problem.out.head + index.query * problem.out.row;
    if (problem.running) clip_row(row, problem.held);
    if (problem.weights) row.scores = element(problem, problem.weights, span, index);
    if (plan.keeps_scores) row.scores = memory.scores + i * problem.kv_len * size;
  }
}

void spread_masks(const Problem& problem, const RowSpan& span, const ThreadMemory& memory, std::int64_t first,
                  int count) {
  const std::int64_t masked_from = problem.masked_from(span.batch);
  for (int i = 0; i < span.valid; ++i) {
    const std::uint8_t* mask = mask_of(problem, span, row_index(span, i));
    std::uint8_t* spread = memory.masks + std::int64_t{i} * memory.mask_stride;
    for (int j = 0; j < count; ++j) {
      const std::int64_t column = first + j - masked_from;
      spread[j] = column < 0 ? 1 : mask[column * problem.mask.column];
    }
    memory.rows[i].mask = spread - first;  // where key 0 would be
  }
}

void complete_rows(const Problem& problem, const Plan& plan, const RowSpan& span, const ThreadMemory& memory,
                   const char* row_max, const char* row_sum) {
  const std::int64_t size = size_of(problem.dtype);
  RowIndex index = row_index(span, 0);
  for (int i = 0; i < span.valid; ++i, index = next_row(span, index)) {
    const Row& row = memory.rows[i];
    const double max = read_real(row_max + i * size, problem.dtype);
    const double sum = read_real(row_sum + i * size, problem.dtype);
    const bool undefined = sum == 0 && sees_a_key(problem, span, index, row);
    double* mass = problem.key_mass ? memory.mass + (index.head - span.first_head) * problem.kv_len : nullptr;
    if (undefined)
      fill_row(static_cast<char*>(row.out), size_of(plan.out_type), problem.value_dim,
               std::numeric_limits<double>::quiet_NaN(), plan.out_type);
    if (plan.copies_out)
      scatter_row(*plan.kernels, {element(problem, problem.out, span, index), problem.out.column, problem.out.dtype},
                  static_cast<char*>(row.out), problem.dtype, problem.value_dim);
    if (problem.lse)
      write_real(element(problem, problem.lse, span, index), lse_of(max, sum, row.omitted), problem.lse.dtype);
    if (row.scores) finish_weights(problem, plan, row, {max, sum, undefined}, mass);
    if (problem.weights) clear_hidden_weights(problem, row);
  }
}

double lse_of(double row_max, double row_sum, double omitted) {
  return row_sum == 0 ? -infinity : (row_max + std::log2(row_sum) - omitted) * ln_2;
}

void load_sums(const Problem& problem, const RowSpan& span, const ThreadMemory& memory) {
  with_type(problem.dtype, [&]<class T> { load<T>(problem, span, memory); });
}

void store_sums(const Problem& problem, const RowSpan& span, const ThreadMemory& memory) {
  with_type(problem.dtype, [&]<class T> { store<T>(problem, span, memory); });
}

void clear_rows(const Problem& problem, const RowSpan& span) {
  for (int i = span.valid; i < span.count; ++i) {
    const RowIndex index = row_index(span, i);
    fill_row(element(problem, problem.out, span, index), problem.out.column, problem.value_dim, 0, problem.out.dtype);
    if (problem.lse) write_real(element(problem, problem.lse, span, index), -infinity, problem.lse.dtype);
    if (problem.weights)
      fill_row(element(problem, problem.weights, span, index), problem.weights.column, problem.kv_len, 0,
               problem.dtype);
  }
}

void merge_ranges(const Problem& problem, const Plan& plan, const Shared& shared, std::int64_t block,
                  const RowSpan& span, const ThreadMemory& memory) {
  describe_rows(problem, plan, span, memory, /*with_sinks=*/false);
  with_type(problem.dtype, [&]<class T> { merge<T>(problem, plan, shared, block, span, memory); });
  complete_rows(problem, plan, span, memory, memory.row_max, memory.row_sum);
}

}  // namespace selfattn
