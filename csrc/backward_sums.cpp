#include "backward_sums.h"

#include <algorithm>
#include <cmath>

namespace selfattn {
namespace {

// The dot product of query `row` and its gradient. Skips gradients of 0: a query that sees no key may hold NaN,
// and 0 * NaN is NaN.
template <class T>
double dot(const char* queries, const PaddedRows& form, const T* gradient, int row) {
  const std::int64_t size = size_of(form.dtype);
  const char* query = queries + row * form.stride * size;
  double sum = 0;
  for (std::int64_t d = 0; d < form.width; ++d)
    if (gradient[d] != 0) sum += read_real(query + d * size, form.dtype) * static_cast<double>(gradient[d]);
  return sum;
}

}  // namespace

template <class T>
void ScoreSums<T>::add_scores(const BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const {
  if (!memory.dscores) return;
  const std::int64_t head = span.batch * problem_.num_heads + span.first_head;
  for (int i = 0; i < span.valid; ++i) {
    const T* from = dscores_of(memory, i);
    if (gradients_.key_sums)
      plan_.kernel->add(from, task.count,
                        reinterpret_cast<T*>(gradients_.key_sums) + head * problem_.kv_len + task.first);
    if (gradients_.scores)
      plan_.kernel->add(
          from, task.count,
          reinterpret_cast<T*>(element(problem_, gradients_.scores, span, row_index(span, i))) + task.first);
  }
  if (gradients_.distance_bias) add_distances(task, span, memory);
}

// Row i and key j belong to column valid - 1 - i + j, so all pairs of a column have the same distance.
template <class T>
void ScoreSums<T>::add_distances(const BackwardTask& task, const RowSpan& span,
                                 const BackwardThreadMemory& memory) const {
  const ByDistance& table = problem_.distance_bias;
  const std::int64_t columns = span.valid - 1 + task.count, first = farthest(task, span);
  T* sums = reinterpret_cast<T*>(memory.columns);
  std::fill_n(sums, columns, T(0));
  for (int i = 0; i < span.valid; ++i) plan_.kernel->add(dscores_of(memory, i), task.count, sums + span.valid - 1 - i);
  for (std::int64_t c = 0; c < columns; ++c)
    memory.distance_sums[table.index_of(first - c)] += static_cast<double>(sums[c]);
}

template <class T>
void ScoreSums<T>::add_rows(const BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const {
  const std::int64_t index = row_index(problem_, span);
  if (gradients_.scale)
    for (int i = 0; i < span.valid; ++i) {
      const auto row = [&](const char* gradients) {
        return reinterpret_cast<const T*>(gradients) + i * plan_.key_stride;
      };
      double sum = dot(memory.operands.queries, plan_.keys, row(memory.dquery), i);
      if (problem_.relative) sum += dot(memory.relative.queries, plan_.keys, row(memory.relative.dquery), i);
      gradients_.scale[index + i] += sum;
    }
  T* line = reinterpret_cast<T*>(memory.columns);
  const std::int64_t columns = plan_.block_rows + plan_.score_stride;
  if (gradients_.slopes) {
    const std::int64_t first = farthest(task, span);
    for (std::int64_t c = 0; c < columns; ++c) line[c] = static_cast<T>(-std::abs(first - c));
    multiply_rows(span, memory, gradients_.slopes + index);
  }
  if (gradients_.row_sums) {
    std::fill_n(line, columns, T(1));
    multiply_rows(span, memory, gradients_.row_sums + index);
  }
}

// memory.columns holds one number per column. For each row, multiplies the gradients of its scores by the numbers of
// their columns, and adds the sum of these products to the row's element of `sums`.
template <class T>
void ScoreSums<T>::multiply_rows(const RowSpan& span, const BackwardThreadMemory& memory, double* sums) const {
  const T* line = reinterpret_cast<const T*>(memory.columns) + span.valid - 1;
  for (int i = 0; i < span.valid; ++i)
    sums[i] += plan_.kernel->dot(dscores_of(memory, i), line - i, plan_.score_stride);
}

template <class T>
void ScoreSums<T>::deliver_distances(const RowSpan& span, const BackwardThreadMemory& memory) const {
  const std::int64_t count = problem_.distance_bias.count;
  double* sums = gradients_.distance_bias + (span.batch * problem_.num_heads + span.first_head) * count;
  for (std::int64_t i = 0; i < count; ++i) sums[i] += memory.distance_sums[i];
  std::fill_n(memory.distance_sums, count, 0.0);
}

template class ScoreSums<float>;
template class ScoreSums<double>;

}  // namespace selfattn
