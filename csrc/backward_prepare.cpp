#include "backward_prepare.h"

#include <cmath>
#include <limits>

namespace selfattn {

template <class T>
void RowPreparation<T>::prepare(const RowSpan& span, const BackwardThreadMemory& memory) const {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const std::int64_t lanes = plan_.kernel->lanes, first = padded_row_index(problem_, plan_, span);
  const std::int64_t stride = plan_.value_stride;
  T* shift = reinterpret_cast<T*>(shared_.shift) + first;
  T* factor = reinterpret_cast<T*>(shared_.factor) + first;
  T* delta = reinterpret_cast<T*>(shared_.delta) + first;
  const auto rows = [&](const Operand& operand, char* copy) {
    return gather(*plan_.kernels, rows_of(problem_, operand, span), span.valid,
                  {problem_.value_dim, stride, type_of<T>}, copy);
  };
  const char* dout = rows(gradients_.dout, memory.dout);
  const char* out = rows(problem_.out, memory.out);
  const ValidKeys valid = valid_keys(problem_, span.batch);
  const double most = largest_peak();
  for (int i = 0; i < span.valid; ++i) {
    const RowIndex index = row_index(span, i);
    const double lse = read_real(element(problem_, problem_.lse, span, index), problem_.lse.dtype);
    const std::int64_t at = i * stride * static_cast<std::int64_t>(sizeof(T));
    double sum = plan_.kernel->dot(dout + at, out + at, stride);
    if (gradients_.dlse) sum -= read_real(element(problem_, gradients_.dlse, span, index), gradients_.dlse.dtype);
    const Row row = describe_row(problem_, span, index, valid);
    const double peak = lse * log2_e + row.omitted;
    const bool empty = lse == -infinity || (std::isfinite(peak) && std::abs(peak) > most);
    // The factor corrects the rounding of the shift.
    shift[i] = static_cast<T>(empty ? infinity : peak);
    factor[i] = static_cast<T>(empty ? 0 : std::exp2(static_cast<double>(shift[i]) - peak));
    delta[i] = static_cast<T>(sum);
    if (gradients_.sinks && !empty) gradients_.sinks[row_index(problem_, span) + i] = -std::exp2(row.sink - peak) * sum;
  }
  for (std::int64_t i = span.valid; i < round_up(span.count, lanes); ++i) shift[i] = factor[i] = delta[i] = 0;
  const KeyRange seen = span_keys(problem_, span);
  const int unseen = seen.begin < seen.end ? span.valid : 0;
  if (gradients_.query) clear_rows(problem_, gradients_.query, span, unseen);
}

template class RowPreparation<float>;
template class RowPreparation<double>;

}  // namespace selfattn
