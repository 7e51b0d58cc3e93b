#include "rows.h"

#include <algorithm>
#include <cstring>

#define SELFATTN_ISA core  // compiles this header with baseline flags, in namespace core
#include "simd/narrow.h"

namespace selfattn {
namespace {

constexpr std::int64_t run = 256;  // strided elements that are converted at a time, in a contiguous buffer

template <class E>
E read(const char* p) {
  E element;
  std::memcpy(&element, p, sizeof element);
  return element;
}

template <class E>
void write(char* p, E element) {
  std::memcpy(p, &element, sizeof element);
}

template <class T>
void scale_elements(char* row, std::int64_t count, double factor) {
  T* elements = reinterpret_cast<T*>(row);
  for (std::int64_t i = 0; i < count; ++i) elements[i] *= static_cast<T>(factor);
}

void widen_row(const KernelSet& kernels, char* to, const SourceRows& from, std::int64_t count) {
  const auto widen = kernels.f32.of(from.dtype).widen;
  const std::int64_t size = size_of(from.dtype);
  float* floats = reinterpret_cast<float*>(to);
  if (from.column == size && reinterpret_cast<std::uintptr_t>(from.data) % static_cast<std::uintptr_t>(size) == 0)
    return widen(from.data, count, floats);
  alignas(64) char together[run * narrow_size];
  for (std::int64_t first = 0; first < count; first += run) {
    const std::int64_t n = std::min(run, count - first);
    copy_rows({together, 0, size}, {from.data + first * from.column, 0, from.column}, 1, n, size);
    widen(together, n, floats + first);
  }
}

// Whether the rows are the columns of contiguous rows in memory.
bool are_columns(const SourceRows& from) {
  const std::int64_t size = size_of(from.dtype);
  return from.row == size && from.column != size && from.column % size == 0 &&
         reinterpret_cast<std::uintptr_t>(from.data) % static_cast<std::uintptr_t>(size) == 0;
}

}  // namespace

double read_real(const char* p, DType dtype) {
  switch (dtype) {
    case DType::f64:
      return read<double>(p);
    case DType::f16:
      return static_cast<double>(core::widen(read<core::Half>(p)));
    case DType::bf16:
      return static_cast<double>(core::widen(read<core::BFloat>(p)));
    case DType::i8:
      return read<std::int8_t>(p);
    default:
      return static_cast<double>(read<float>(p));
  }
}

void write_real(char* p, double x, DType dtype) {
  switch (dtype) {
    case DType::f64:
      return write(p, x);
    case DType::f16:
      return write(p, core::to_half(static_cast<float>(x)));
    case DType::bf16:
      return write(p, core::to_bfloat(static_cast<float>(x)));
    default:
      return write(p, static_cast<float>(x));
  }
}

void copy_rows(const StridedRows<char>& to, const StridedRows<const char>& from, std::int64_t rows, std::int64_t count,
               std::int64_t size) {
  const auto bytes = static_cast<std::size_t>(size);
  const auto is_dense = [&](const auto& array) { return array.column == size && array.row == count * size; };
  if (rows > 1 && is_dense(to) && is_dense(from)) return copy_rows(to, from, 1, rows * count, size);
  for (std::int64_t r = 0; r < rows; ++r) {
    char* target = to.data + r * to.row;
    const char* source = from.data + r * from.row;
    if (to.column == size && from.column == size) {
      std::memcpy(target, source, bytes * static_cast<std::size_t>(count));
    } else {
      for (std::int64_t i = 0; i < count; ++i) std::memcpy(target + i * to.column, source + i * from.column, bytes);
    }
  }
}

void gather_rows(const KernelSet& kernels, char* to, DType to_type, const SourceRows& from, std::int64_t rows,
                 std::int64_t count) {
  const std::int64_t size = size_of(to_type);
  const DType computed = computed_in(from.dtype);
  const auto transpose = kernels.computing(computed).of(from.dtype).transpose;
  if (rows > 1 && transpose && (to_type == from.dtype || to_type == computed) && are_columns(from))
    return transpose(from.data, from.column / size_of(from.dtype), rows, count, to_type, to);
  if (from.dtype == to_type) return copy_rows({to, count * size, size}, from, rows, count, size);
  SourceRows row = from;
  for (std::int64_t r = 0; r < rows; ++r, to += count * size, row.data += from.row) {
    if (computed == DType::f32 && from.dtype != DType::f32 && to_type == DType::f32)
      widen_row(kernels, to, row, count);
    else if (is_narrow(to_type) && from.dtype == DType::f32 && from.column == size_of(from.dtype))
      scatter_row(kernels, {to, size, to_type}, row.data, from.dtype, count);
    else  // rare: to double, or strided floats to 16 bits
      for (std::int64_t i = 0; i < count; ++i)
        write_real(to + i * size, read_real(row.data + i * from.column, from.dtype), to_type);
  }
}

void scale_row(char* row, DType dtype, std::int64_t count, double factor) {
  with_type(dtype, [&]<class T> { scale_elements<T>(row, count, factor); });
}

void scatter_row(const KernelSet& kernels, const TargetRow& to, const char* from, DType from_type, std::int64_t count) {
  const std::int64_t size = size_of(to.dtype);
  if (from_type == to.dtype) return copy_rows({to.data, 0, to.column}, {from, 0, size}, 1, count, size);
  if (from_type == DType::f64) {  // rare: gradients of keys narrower than float64 queries
    for (std::int64_t i = 0; i < count; ++i)
      write_real(to.data + i * to.column, read_real(from + i * size_of(from_type), from_type), to.dtype);
    return;
  }
  const auto narrow = kernels.f32.of(to.dtype).narrow;
  const float* floats = reinterpret_cast<const float*>(from);
  alignas(64) char together[run * narrow_size];
  for (std::int64_t first = 0; first < count; first += run) {
    const std::int64_t n = std::min(run, count - first);
    narrow(floats + first, n, together);
    copy_rows({to.data + first * to.column, 0, to.column}, {together, 0, narrow_size}, 1, n, narrow_size);
  }
}

}  // namespace selfattn
