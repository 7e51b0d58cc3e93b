// Rows of a backward pass: indices of per-row results, and copies of operands in the form that kernels need.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "backward.h"
#include "rows.h"
#include "score_rows.h"

namespace selfattn {

// A range of keys of one KV head.
struct BackwardTask {
  std::int64_t index, range, batch, kv_head;
  int thread;
  std::int64_t first = 0;  // first key
  int count = 0;
  bool finite = false;       // no key or value of the task is NaN or infinite
  std::int64_t carried = 0;  // number of distances whose sums are in RelativeMemory::dvectors
};

template <class T>
constexpr DType type_of = sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;

// The index of a span's first query in arrays with one row per query of each head and batch entry.
inline std::int64_t row_index(const Problem& problem, const RowSpan& span) {
  return (span.batch * problem.num_heads + span.first_head) * problem.q_len + span.first;
}

// row_index for arrays that are padded to whole blocks of rows.
inline std::int64_t padded_row_index(const Problem& problem, const BackwardPlan& plan, const RowSpan& span) {
  return (span.batch * problem.num_heads + span.first_head) * plan.row_blocks * plan.block_rows + span.first;
}

inline SourceRows rows_of(const Problem& problem, const Operand& operand, const RowSpan& span) {
  return {{element(problem, operand, span, row_index(span, 0)), operand.row, operand.column}, operand.dtype};
}

// Sets the gradients of a span's queries to 0, from row `first` of the span on.
inline void clear_rows(const Problem& problem, const Operand& operand, const RowSpan& span, int first) {
  for (int i = first; i < span.count; ++i) {
    char* row = element(problem, operand, span, row_index(span, i));
    for (std::int64_t d = 0; d < problem.head_dim; ++d) write_real(row + d * operand.column, 0, operand.dtype);
  }
}

// Copies `count` rows and converts them to `form`.
inline void copy_padded(const KernelSet& kernels, const SourceRows& from, std::int64_t count, const PaddedRows& form,
                        char* to) {
  const std::int64_t size = size_of(form.dtype), width = form.width;
  if (width == form.stride) return gather_rows(kernels, to, form.dtype, from, count, width);
  for (std::int64_t r = 0; r < count; ++r, to += form.stride * size) {
    gather_rows(kernels, to, form.dtype, {{from.data + r * from.row, 0, from.column}, from.dtype}, 1, width);
    std::memset(to + width * size, 0, static_cast<std::size_t>((form.stride - width) * size));
  }
}

// Returns `count` rows in `form`: the rows of `from` themselves if they have this form, otherwise copies in `to`. Rows
// of 16-bit numbers must be aligned like floats, because kernels read pairs of these numbers as floats.
inline const char* gather(const KernelSet& kernels, const SourceRows& from, std::int64_t count, const PaddedRows& form,
                          char* to) {
  const std::int64_t size = size_of(form.dtype), alignment = std::max<std::int64_t>(size, sizeof(float));
  const bool aligned = reinterpret_cast<std::uintptr_t>(from.data) % static_cast<std::uintptr_t>(alignment) == 0;
  if (form.width == form.stride && from.dtype == form.dtype && aligned && from.column == size &&
      from.row == form.stride * size)
    return from.data;
  copy_padded(kernels, from, count, form, to);
  return to;
}

// Gathers the valid queries of a span in the form plan.keys. If there is a `bias`, adds the head's row of `bias` to
// each query; plan.keys then has the type of computation.
template <class T>
const char* gather_queries(const Problem& problem, const BackwardPlan& plan, const RowSpan& span, const PerHead& bias,
                           char* to) {
  const SourceRows rows = rows_of(problem, problem.query, span);
  if (!bias) return gather(*plan.kernels, rows, span.valid, plan.keys, to);
  copy_padded(*plan.kernels, rows, span.valid, plan.keys, to);
  T* row = reinterpret_cast<T*>(to);
  for (int i = 0; i < span.valid; ++i, row += plan.keys.stride)
    add_doubles(row, bias.data + span.first_head * bias.head, problem.head_dim);
  return to;
}

}  // namespace selfattn
