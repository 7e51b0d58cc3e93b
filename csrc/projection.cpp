#include "projection.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "aligned_memory.h"
#include "rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

using MatrixRows = StridedRows<char>;

// The same rows, for reading.
StridedRows<const char> source(const MatrixRows& rows) { return {rows.data, rows.row, rows.column}; }

}  // namespace

void Projection::Free::operator()(char* p) const { std::free(p); }

// Calls copy(packed, plain, rows, columns, size) for rows that are equally spaced both in a panel and in the matrix:
// all rows of a panel, or every second or fourth row if that many rows form cells.
template <class Copy>
void Projection::each_rows(const TensorView& weights, Copy copy) const {
  const std::int64_t size = size_of(dtype_), width = panel_columns();
  const std::int64_t together = digits_ > 0 ? digit_cell : pairs_ ? 2 : 1;
  const std::int64_t row = weights.strides[0], column = weights.strides[1];
  for (std::int64_t first = 0; first < columns_; first += width) {
    char* panel = panels_.get() + first * panel_rows() * size;
    char* plain = static_cast<char*>(weights.data) + first * column;
    for (std::int64_t i = 0; i < together && i < depth_; ++i)
      copy(MatrixRows{panel + i * size, together * width * size, together * size},
           MatrixRows{plain + i * row, together * row, column}, ceil_div(depth_ - i, together),
           std::min(width, columns_ - first), size);
  }
}

Projection::Projection(const KernelSet& kernels, const TensorView& weights, const TensorView& bias,
                       const TensorView& scales, int digits)
    : kernels_(&kernels),
      types_(&kernels.computing(computed_in(weights.dtype))),
      dtype_(weights.dtype),
      pairs_(weights.dtype == DType::bf16 && kernels.matrix.project_bf16 != nullptr),
      digits_(digits),
      depth_(weights.shape[0]),
      columns_(weights.shape[1]) {
  const std::int64_t width = panel_columns(), size = size_of(dtype_), wide = size_of(computation());
  const std::int64_t rows = panel_rows(), bytes = bytes_of(panels(), rows, width, size);
  panels_.reset(allocate_aligned(static_cast<std::size_t>(bytes)));
  std::memset(panels_.get(), 0, static_cast<std::size_t>(bytes));
  each_rows(weights, [](MatrixRows packed, MatrixRows plain, std::int64_t count, std::int64_t columns,
                        std::int64_t bytes) { copy_rows(packed, source(plain), count, columns, bytes); });
  if (scales) {
    groups_ = scales.shape[0];
    const std::int64_t row = padded_columns() * size_of(DType::f32);
    scales_.reset(allocate_aligned(static_cast<std::size_t>(groups_ * row)));
    std::memset(scales_.get(), 0, static_cast<std::size_t>(groups_ * row));
    copy_rows({scales_.get(), row, size_of(DType::f32)},
              {static_cast<const char*>(scales.data), scales.strides[0], scales.strides[1]}, groups_, columns_,
              size_of(DType::f32));
  }
  if (digits_ > 0) sum_codes(weights);
  if (!bias) return;
  bias_.reset(allocate_aligned(static_cast<std::size_t>(bytes_of(panels(), width, wide))));
  std::memset(bias_.get(), 0, static_cast<std::size_t>(panels() * width * wide));
  const SourceRows row{{static_cast<const char*>(bias.data), 0, bias.strides[0]}, bias.dtype};
  gather_rows(kernels, bias_.get(), computation(), row, 1, columns_);
}

int Projection::digits_for(const KernelSet& kernels, Precision precision, std::int64_t group_depth) {
  if (!kernels.matrix.project_codes || group_depth % digit_cell != 0) return 0;
  return precision == Precision::highest ? 0 : precision == Precision::high ? most_digits : 1;
}

void Projection::sum_codes(const TensorView& weights) {
  const std::int64_t group = depth_ / groups_;
  for (std::int64_t first = 0, next; first < depth_; first = next) {
    next = std::min(first + code_slice, (first / group + 1) * group);
    starts_.resize(starts_.size() + static_cast<std::size_t>(padded_columns()));
    std::int32_t* starts = &*(starts_.end() - padded_columns());
    for (std::int64_t row = first; row < next; ++row)
      for (std::int64_t column = 0; column < columns_; ++column)
        starts[column] -=
            128 * static_cast<const std::int8_t*>(weights.data)[row * weights.strides[0] + column * weights.strides[1]];
  }
}

std::int64_t Projection::panel_rows() const {
  constexpr std::int64_t whole = 32;  // depth of a tile, in elements
  return pairs_ ? round_up(depth_, whole) : depth_;
}

void Projection::unpack(const TensorView& weights) const {
  each_rows(weights, [](MatrixRows packed, MatrixRows plain, std::int64_t count, std::int64_t columns,
                        std::int64_t bytes) { copy_rows(plain, source(packed), count, columns, bytes); });
}

std::int64_t Projection::columns_of(Panels panels) const {
  const std::int64_t width = panel_columns();
  return std::min(panels.count * width, columns_ - panels.first * width);
}

void Projection::project(Panels panels, const Rows& rows) const noexcept {
  const std::int64_t first = panels.first * panel_columns();
  const auto kernel = digits_ > 0              ? kernels_->matrix.project_codes
                      : !pairs_                ? types_->of(dtype_).project
                      : rows.operand == dtype_ ? kernels_->matrix.project_bf16
                                               : kernels_->matrix.project_f32;
  kernel({rows.x, rows.x_stride, rows.count, depth_, panels_.get() + panels.first * panel_bytes(),
          bias_ ? bias_.get() + first * size_of(computation()) : nullptr, rows.out, rows.out_stride, columns_of(panels),
          panel_bytes(), groups_ > 0 ? scales(0) + first : nullptr, padded_columns(),
          std::max<std::int64_t>(groups_, 1), digits_ > 0 ? starts_.data() + first : nullptr, digits_});
}

RowsView::RowsView(const TensorView& x)
    : data(static_cast<const char*>(x.data)), dtype(x.dtype), rows(x.extent(1)), row(x.stride(1)), column(x.stride(0)) {
  int left = x.ndim - 2;
  for (; left > 0 && (x.strides[left - 1] == rows * row || x.shape[left - 1] == 1); --left) rows *= x.shape[left - 1];
  for (; left > 0; --left) {
    axes.push_back({outer, x.shape[left - 1], x.strides[left - 1]});
    outer *= x.shape[left - 1];
  }
}

RowsView::RowsView(const char* data, DType dtype, std::int64_t rows, std::int64_t columns)
    : data(data), dtype(dtype), rows(rows), row(columns * size_of(dtype)), column(size_of(dtype)) {}

const char* RowsView::at(std::int64_t index) const {
  const char* p = data;
  for (const BatchAxis& axis : axes) p += index / axis.inside % axis.extent * axis.stride;
  return p;
}

}  // namespace selfattn
