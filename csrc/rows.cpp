#include "rows.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace selfattn {
namespace {

constexpr std::int64_t run = 256;  // strided elements that are converted at a time, in a contiguous buffer

template <class T>
void scale_elements(char* row, std::int64_t count, double factor) {
  T* elements = reinterpret_cast<T*>(row);
  for (std::int64_t i = 0; i < count; ++i) elements[i] *= static_cast<T>(factor);
}

bool is_aligned(const char* p, DType dtype) {
  return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(alignment_of(dtype)) == 0;
}

void widen_row(const KernelSet& kernels, char* to, const SourceRows& from, std::int64_t count) {
  const auto widen = kernels.f32.of(from.dtype).widen;
  const std::int64_t size = size_of(from.dtype);
  float* floats = reinterpret_cast<float*>(to);
  if (from.column == size && is_aligned(from.data, from.dtype)) return widen(from.data, count, floats);
  alignas(64) char together[run * narrow_size];
  for (std::int64_t first = 0; first < count; first += run) {
    const std::int64_t n = std::min(run, count - first);
    copy_rows({together, 0, size}, {from.data + first * from.column, 0, from.column}, 1, n, size);
    widen(together, n, floats + first);
  }
}

// The words of a row are adjacent: only caches store such types.
void unpack_row(const KernelSet& kernels, char* to, DType to_type, const SourceRows& from, std::int64_t count) {
  const ElementType& type = element_type(from.dtype);
  const StoredKernels& stored = kernels.computing(type.computed).of(from.dtype);
  if (to_type == type.unpacked) return stored.unpack(from.data, count, to);
  if (to_type == DType::f32) return stored.widen(from.data, count, reinterpret_cast<float*>(to));
  double numbers[most_elements];  // rare: to double
  for (std::int64_t first = 0; first < count; first += type.elements) {
    type.read(from.data + first / type.elements * type.bytes, numbers);
    for (std::int64_t i = 0; i < std::min(type.elements, count - first); ++i)
      write_real(to + (first + i) * size_of(to_type), numbers[i], to_type);
  }
}

// Whether the rows are the columns of contiguous rows in memory.
bool are_columns(const SourceRows& from) {
  const std::int64_t size = size_of(from.dtype);
  return from.row == size && from.column != size && from.column % size == 0 && is_aligned(from.data, from.dtype);
}

}  // namespace

double read_real(const char* p, DType dtype) {
  assert(!shares_words(dtype));
  double x;
  element_type(dtype).read(p, &x);
  return x;
}

void write_real(char* p, double x, DType dtype) { element_type(dtype).write(p, &x); }

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
  if (from.dtype == to_type) {
    const std::int64_t words = words_of(to_type, count);
    return copy_rows({to, words * size, size}, from, rows, words, size);
  }
  SourceRows row = from;
  for (std::int64_t r = 0; r < rows; ++r, to += count * size, row.data += from.row) {
    if (shares_words(from.dtype))
      unpack_row(kernels, to, to_type, row, count);
    else if (computed == DType::f32 && from.dtype != DType::f32 && to_type == DType::f32)
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
