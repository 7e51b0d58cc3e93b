#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#define SELFATTN_ISA core  // compiles this header with baseline flags, in namespace core
#include "simd/narrow.h"

namespace selfattn {
namespace {

constexpr std::int64_t run = 256;  // elements per chunk, where strided memory goes through a contiguous buffer

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

const Conversion& conversion_of(const KernelSet& kernels, DType dtype) {
  return dtype == DType::f16 ? kernels.f16 : dtype == DType::bf16 ? kernels.bf16 : kernels.i8;
}

template <class T>
void scale_elements(char* row, std::int64_t count, double factor) {
  T* elements = reinterpret_cast<T*>(row);
  for (std::int64_t i = 0; i < count; ++i) elements[i] *= static_cast<T>(factor);
}

void widen_row(const KernelSet& kernels, char* to, const char* from, DType type, std::int64_t from_column,
               std::int64_t count) {
  const Conversion& conversion = conversion_of(kernels, type);
  const std::int64_t size = size_of(type);
  float* floats = reinterpret_cast<float*>(to);
  if (from_column == size && reinterpret_cast<std::uintptr_t>(from) % static_cast<std::uintptr_t>(size) == 0)
    return conversion.widen(from, count, floats);
  alignas(64) char together[run * narrow_size];
  for (std::int64_t first = 0; first < count; first += run) {
    const std::int64_t n = std::min(run, count - first);
    copy_rows(together, 0, size, from + first * from_column, 0, from_column, 1, n, size);
    conversion.widen(together, n, floats + first);
  }
}

}  // namespace

double clamp_finite(double x, double most) { return std::isfinite(x) ? std::clamp(x, -most, most) : x; }

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

void copy_rows(char* to, std::int64_t to_row, std::int64_t to_column, const char* from, std::int64_t from_row,
               std::int64_t from_column, std::int64_t rows, std::int64_t count, std::int64_t size) {
  const auto bytes = static_cast<std::size_t>(size);
  for (std::int64_t r = 0; r < rows; ++r, to += to_row, from += from_row) {
    if (to_column == size && from_column == size) {
      std::memcpy(to, from, bytes * static_cast<std::size_t>(count));
    } else {
      for (std::int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_column, from + i * from_column, bytes);
    }
  }
}

void gather_rows(const KernelSet& kernels, char* to, DType to_type, const char* from, DType from_type,
                 std::int64_t from_row, std::int64_t from_column, std::int64_t rows, std::int64_t count) {
  const std::int64_t size = size_of(to_type);
  if (from_type == to_type) return copy_rows(to, count * size, size, from, from_row, from_column, rows, count, size);
  for (std::int64_t r = 0; r < rows; ++r, to += count * size, from += from_row) {
    if (computed_in(from_type) == DType::f32 && from_type != DType::f32 && to_type == DType::f32)
      widen_row(kernels, to, from, from_type, from_column, count);
    else if (is_narrow(to_type) && from_type == DType::f32 && from_column == size_of(from_type))
      scatter_row(kernels, to, to_type, size, from, from_type, count);
    else  // rare: to double, or strided floats to 16 bits
      for (std::int64_t i = 0; i < count; ++i)
        write_real(to + i * size, read_real(from + i * from_column, from_type), to_type);
  }
}

void scale_row(char* row, DType dtype, std::int64_t count, double factor) {
  dtype == DType::f32 ? scale_elements<float>(row, count, factor) : scale_elements<double>(row, count, factor);
}

void scatter_row(const KernelSet& kernels, char* to, DType to_type, std::int64_t to_column, const char* from,
                 DType from_type, std::int64_t count) {
  if (from_type == to_type) return copy_rows(to, 0, to_column, from, 0, size_of(to_type), 1, count, size_of(to_type));
  if (from_type == DType::f64) {  // rare: gradients of keys narrower than float64 queries
    for (std::int64_t i = 0; i < count; ++i)
      write_real(to + i * to_column, read_real(from + i * size_of(from_type), from_type), to_type);
    return;
  }
  const Conversion& conversion = conversion_of(kernels, to_type);
  const float* floats = reinterpret_cast<const float*>(from);
  alignas(64) char together[run * narrow_size];
  for (std::int64_t first = 0; first < count; first += run) {
    const std::int64_t n = std::min(run, count - first);
    conversion.narrow(floats + first, n, together);
    copy_rows(to + first * to_column, 0, to_column, together, 0, narrow_size, 1, n, narrow_size);
  }
}

}  // namespace selfattn
