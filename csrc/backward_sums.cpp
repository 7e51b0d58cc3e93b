#include "backward_sums.h"

#include <algorithm>
#include <cmath>

namespace selfattn {
namespace {

// Where the gradient is 0, as for a query that sees no key, the query may hold anything.
template <class T>
double dot(const char* queries, const char* gradients, std::int64_t first, std::int64_t count) {
  const T* query = reinterpret_cast<const T*>(queries) + first;
  const T* gradient = reinterpret_cast<const T*>(gradients) + first;
  double sum = 0;
  for (std::int64_t d = 0; d < count; ++d)
    if (gradient[d] != 0) sum += static_cast<double>(query[d]) * static_cast<double>(gradient[d]);
  return sum;
}

}  // namespace

template <class T>
void ScoreSums<T>::add_scores(const BackwardTask& task, const RowSpan& span, const BackwardSlot& slot) const {
  T* sums = gradients_.key_sums ? reinterpret_cast<T*>(gradients_.key_sums) +
                                      (span.batch * problem_.num_heads + span.first_head) * problem_.kv_len + task.first
                                : nullptr;
  for (int i = 0; i < span.valid; ++i) {
    const T* from = dscores_of(slot, i);
    if (sums)
      for (int j = 0; j < task.count; ++j) sums[j] += from[j];
    if (!gradients_.scores) continue;
    T* to = reinterpret_cast<T*>(element(problem_, gradients_.scores, span, place_of(span, i))) + task.first;
    for (int j = 0; j < task.count; ++j) to[j] += from[j];
  }
}

template <class T>
void ScoreSums<T>::add_distances(const BackwardTask& task, const RowSpan& span, const BackwardSlot& slot) const {
  const ByDistance& table = problem_.distance_bias;
  for (int i = 0; i < span.valid; ++i) {
    const T* from = dscores_of(slot, i);
    const std::int64_t first = place_of(span, i).query + problem_.offset_of(span.batch) - task.first + table.origin;
    for (int j = 0; j < task.count; ++j)
      slot.distance_sums[std::clamp<std::int64_t>(first - j, 0, table.count - 1)] += static_cast<double>(from[j]);
  }
}

template <class T>
void ScoreSums<T>::add_rows(const BackwardTask& task, const RowSpan& span, const BackwardSlot& slot) const {
  const std::int64_t index = row_index(problem_, span), offset = problem_.offset_of(span.batch);
  for (int i = 0; i < span.valid; ++i) {
    if (gradients_.scale) {
      const std::int64_t place = i * plan_.key_step, width = problem_.head_dim;
      double sum = dot<T>(slot.operands.queries, slot.dquery, place, width);
      if (problem_.relative) sum += dot<T>(slot.relative.queries, slot.relative.dquery, place, width);
      gradients_.scale[index + i] += sum;
    }
    if (!gradients_.slopes && !gradients_.row_sums) continue;
    const T* from = dscores_of(slot, i);
    const double position = static_cast<double>(place_of(span, i).query + offset - task.first);
    double sum = 0, moment = 0;
    for (int j = 0; j < task.count; ++j) {
      sum += static_cast<double>(from[j]);
      moment += static_cast<double>(from[j]) * std::abs(position - j);
    }
    if (gradients_.slopes) gradients_.slopes[index + i] -= moment;
    if (gradients_.row_sums) gradients_.row_sums[index + i] += sum;
  }
}

template <class T>
void ScoreSums<T>::deliver_distances(const RowSpan& span, const BackwardSlot& slot) const {
  const std::int64_t count = problem_.distance_bias.count;
  double* sums = gradients_.distance_bias + (span.batch * problem_.num_heads + span.first_head) * count;
  for (std::int64_t i = 0; i < count; ++i) sums[i] += slot.distance_sums[i];
  std::fill_n(slot.distance_sums, count, 0.0);
}

template class ScoreSums<float>;
template class ScoreSums<double>;

}  // namespace selfattn
