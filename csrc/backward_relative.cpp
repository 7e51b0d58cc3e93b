#include "backward_relative.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace selfattn {
namespace {

template <class T>
void add_rows(const char* rows, int count, std::int64_t width, std::int64_t stride, double* sums) {
  const T* row = reinterpret_cast<const T*>(rows);
  for (int i = 0; i < count; ++i, row += stride)
    for (std::int64_t d = 0; d < width; ++d) sums[d] += static_cast<double>(row[d]);
}

}  // namespace

template <class T>
void RelativeSums<T>::start(const BackwardThreadMemory& memory) const {
  const std::int64_t columns = plan_.block_rows + plan_.range_keys - 1;
  if (gradients_.relative) {
    std::fill_n(reinterpret_cast<T*>(memory.relative.dvectors), columns * plan_.key_stride, T(0));
    for (double* end : memory.relative.ends) std::fill_n(end, problem_.head_dim, 0.0);
  }
  if (gradients_.key_bias) std::fill_n(memory.relative.key_bias, problem_.head_dim, 0.0);
  if (gradients_.relative_bias) std::fill_n(memory.relative.relative_bias, problem_.head_dim, 0.0);
}

template <class T>
void RelativeSums<T>::visit(BackwardTask& task, const RowSpan& span, const BackwardThreadMemory& memory) const {
  if (gradients_.through_distances(problem_)) multiply(task, span, memory);
  if (gradients_.relative) task.carried = task.count - 1 + span.valid;
  if (gradients_.key_bias)
    add_rows<T>(memory.dquery, span.valid, problem_.head_dim, plan_.key_stride, memory.relative.key_bias);
  if (gradients_.relative_bias)
    add_rows<T>(memory.relative.dquery, span.valid, problem_.head_dim, plan_.key_stride, memory.relative.relative_bias);
}

template <class T>
void RelativeSums<T>::multiply(const BackwardTask& task, const RowSpan& span,
                               const BackwardThreadMemory& memory) const {
  const std::int64_t stride = plan_.key_stride, row_bytes = stride * static_cast<std::int64_t>(sizeof(T));
  const PerHead& rows = problem_.relative.rows;
  // The distance of the first column; it falls by 1 from column to column.
  const std::int64_t farthest = span.first + span.valid - 1 + problem_.offset_of(span.batch) - task.first;
  const KeyRange seen = span_keys(problem_, span);
  const std::int64_t begin = std::max<std::int64_t>(seen.begin - task.first, 0);
  const std::int64_t end = std::min<std::int64_t>(seen.end - task.first, task.count) + span.valid - 1;
  const std::int64_t width_bytes = problem_.head_dim * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t column = begin; column < end; ++column) {
    char* vector = memory.relative.vectors + column * row_bytes;
    gather_rows(*plan_.kernels, vector, type_of<T>,
                {{problem_.relative.at(span.first_head, farthest - column), 0, rows.column}, rows.dtype}, 1,
                problem_.head_dim);
    std::memset(vector + width_bytes, 0, static_cast<std::size_t>(row_bytes - width_bytes));
  }
  const char* queries = gather_queries<T>(problem_, plan_, span, problem_.relative_bias, memory.relative.queries);
  char* dvectors =
      gradients_.relative ? memory.relative.dvectors + (plan_.block_rows - span.valid) * row_bytes : nullptr;
  plan_.kernel->run_relative(
      {.rows = memory.rows,
       .count = span.valid,
       .head_dim = problem_.head_dim,
       .first_key = task.first,
       .key_count = task.count,
       .column_block = plan_.key_block,
       .dproducts = memory.relative.dproducts + plan_.block_rows * static_cast<std::int64_t>(sizeof(T)),
       .dproduct_stride = plan_.score_stride,
       .queries = queries,
       .vectors = memory.relative.vectors,
       .dquery = gradients_.query || gradients_.scale || gradients_.relative_bias ? memory.relative.dquery : nullptr,
       .dvectors = dvectors,
       .finite = plan_.kernel->finite(memory.relative.vectors + begin * row_bytes, (end - begin) * stride) &&
                 plan_.kernel->finite(queries, span.valid * stride),
       .scratch = memory.kernel_scratch});
}

template <class T>
void RelativeSums<T>::deliver(BackwardTask& task, const RowSpan& span, bool last_of_head,
                              const BackwardThreadMemory& memory) const {
  if (task.carried > 0) {
    const std::int64_t stride = plan_.key_stride, shared = task.count - 1;
    T* first = reinterpret_cast<T*>(memory.relative.dvectors) + (plan_.block_rows - span.valid) * stride;
    const std::int64_t next = std::min(span.first + span.valid, problem_.queries_of(span.batch));
    const std::int64_t farthest = next - 1 + problem_.offset_of(span.batch) - task.first;
    const std::int64_t kept = last_of_head ? 0 : shared;
    for (std::int64_t column = kept; column < shared + span.valid; ++column)
      add_column(span, farthest - column, first + column * stride, memory);
    std::copy_backward(first, first + kept * stride, first + (kept + span.valid) * stride);
    std::fill_n(first, span.valid * stride, T(0));
    task.carried = last_of_head ? 0 : std::max<std::int64_t>(task.carried - span.valid, 0);
  }
  if (last_of_head) deliver_head(span, memory);
}

// Adds a column of the sums to the gradient of its distance's vector, and clears the column. Distances at or beyond
// an end of the table use its first or last vector. The gradients of these two vectors are summed in the thread's
// memory, and deliver_head adds the sums once per head.
template <class T>
void RelativeSums<T>::add_column(const RowSpan& span, std::int64_t distance, T* sums,
                                 const BackwardThreadMemory& memory) const {
  const std::int64_t count = problem_.relative.count, width = problem_.head_dim;
  const std::int64_t row = problem_.relative.index_of(distance);
  if (row == 0 || row == count - 1) {
    double* to = memory.relative.ends[row == 0 ? 0 : 1];
    for (std::int64_t d = 0; d < width; ++d) to[d] += static_cast<double>(sums[d]);
  } else {
    const T scale = static_cast<T>(problem_.scale);
    T* to = reinterpret_cast<T*>(gradients_.relative) +
            ((span.batch * problem_.num_heads + span.first_head) * count + row) * width;
    for (std::int64_t d = 0; d < width; ++d) to[d] += scale * sums[d];
  }
  std::fill_n(sums, plan_.key_stride, T(0));
}

template <class T>
void RelativeSums<T>::deliver_head(const RowSpan& span, const BackwardThreadMemory& memory) const {
  const std::int64_t head = span.batch * problem_.num_heads + span.first_head, width = problem_.head_dim;
  const auto add = [&](double* sums, auto* to) {
    for (std::int64_t d = 0; d < width; ++d)
      to[d] += static_cast<std::remove_pointer_t<decltype(to)>>(problem_.scale * sums[d]);
    std::fill_n(sums, width, 0.0);
  };
  if (gradients_.key_bias) add(memory.relative.key_bias, gradients_.key_bias + head * width);
  if (gradients_.relative_bias) add(memory.relative.relative_bias, gradients_.relative_bias + head * width);
  if (!gradients_.relative) return;
  const std::int64_t count = problem_.relative.count;
  T* table = reinterpret_cast<T*>(gradients_.relative) + head * count * width;
  add(memory.relative.ends[0], table);
  if (count > 1) add(memory.relative.ends[1], table + (count - 1) * width);
}

template class RelativeSums<float>;
template class RelativeSums<double>;

}  // namespace selfattn
