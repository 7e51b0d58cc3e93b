// How stored elements become numbers, and numbers become stored elements, for each element type.
#include "dtype.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#define SELFATTN_ISA core  // compiles this header with baseline flags, in namespace core
#include "simd/narrow.h"

namespace selfattn {
namespace {

template <class E>
double read(const char* p) {
  return static_cast<double>(core::widen(core::element_at(reinterpret_cast<const E*>(p))));
}

template <class E>
void write(char* p, E element) {
  std::memcpy(p, &element, sizeof element);
}

constexpr double largest_float = largest_number(DType::f32);

// The range of numbers, extended to 0.
struct Span {
  float low = 0, high = 0;
  bool finite = true;

  Span(const float* x, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      finite = finite && std::abs(x[i]) <= std::numeric_limits<float>::max();
      low = std::min(low, x[i]);
      high = std::max(high, x[i]);
    }
  }
  double extent() const { return static_cast<double>(high) - static_cast<double>(low); }
};

constexpr int nibble_most = 15;

// The words of 4-bit codes of a row: see core::Int4.
struct NibbleWord {
  const float* x;
  std::int64_t count;
  float scale;

  // The step of the group is the smallest multiple of the scale for which its numbers have 16 codes.
  core::Int4 make(const Span& span) const {
    const double wanted = span.extent() / nibble_most / static_cast<double>(scale);
    const double multiple = std::clamp(std::ceil(wanted), 1.0, double{core::Int4::most_multiple});
    const double step = multiple * static_cast<double>(scale);
    const double zero = std::clamp(std::nearbyint(-static_cast<double>(span.low) / step), 0.0, double{nibble_most});
    const double most = std::floor(largest_float / step);  // beyond it, code * scale would overflow
    core::Int4 word{};
    for (int i = 0; i < core::Int4::elements; ++i) {
      const double steps = i < count ? std::clamp(std::nearbyint(static_cast<double>(x[i]) / step), -most, most) : 0;
      word.set(i, static_cast<int>(std::clamp(zero + steps, 0.0, double{nibble_most})));
    }
    word.group = core::Int4::group_of(static_cast<int>(multiple), static_cast<int>(zero));
    return word;
  }
};

}  // namespace

void read_f32(const char* word, double* numbers) { *numbers = read<float>(word); }
void read_f64(const char* word, double* numbers) { std::memcpy(numbers, word, sizeof *numbers); }
void read_f16(const char* word, double* numbers) { *numbers = read<core::Half>(word); }
void read_bf16(const char* word, double* numbers) { *numbers = read<core::BFloat>(word); }
void read_i8(const char* word, double* numbers) { *numbers = read<core::Int8>(word); }
void read_i4(const char* word, double* numbers) {
  core::Int8 codes[core::Int4::elements];
  core::unpack(core::element_at(reinterpret_cast<const core::Int4*>(word)), codes);
  for (const core::Int8 code : codes) *numbers++ = code.code;
}

void write_f32(char* word, const double* numbers) { write(word, static_cast<float>(*numbers)); }
void write_f64(char* word, const double* numbers) { write(word, *numbers); }
void write_f16(char* word, const double* numbers) { write(word, core::to_half(static_cast<float>(*numbers))); }
void write_bf16(char* word, const double* numbers) { write(word, core::to_bfloat(static_cast<float>(*numbers))); }

float quantise_i8(const float* row, std::int64_t count, char* words) {
  constexpr auto most = static_cast<float>(element_type(DType::i8).codes);
  const Span span(row, count);
  float scale = std::max(-span.low, span.high) / most;
  // For the largest floats, most * scale could overflow.
  if (scale * most > std::numeric_limits<float>::max()) scale = std::nextafter(scale, 0.0f);
  if (!span.finite || scale == 0) {
    std::fill_n(words, count, '\0');
    return span.finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const float code = std::clamp(std::nearbyint(row[i] / scale), -most, most);
    write(words + i, core::Int8{static_cast<std::int8_t>(code)});
  }
  return scale;
}

float quantise_i4(const float* row, std::int64_t count, char* words) {
  constexpr std::int64_t group = core::Int4::elements;
  constexpr double most = element_type(DType::i4).codes;
  double extent = 0;
  bool finite = true;
  const auto each_group = [&](auto use) {
    for (std::int64_t first = 0; first < count; first += group) use(first, std::min(group, count - first));
  };
  each_group([&](std::int64_t first, std::int64_t size) {
    const Span span(row + first, size);
    finite = finite && span.finite;
    extent = std::max(extent, span.extent());
  });
  auto scale = static_cast<float>(extent / most);
  // Rounded up, so that the codes of the widest group reach its ends.
  if (static_cast<double>(scale) * most < extent) scale = std::nextafter(scale, std::numeric_limits<float>::max());
  // For the largest floats, code * scale could overflow.
  if (static_cast<double>(scale) * most > largest_float) scale = std::nextafter(scale, 0.0f);
  if (!finite || scale == 0) {
    std::fill_n(words, row_bytes(DType::i4, count), '\0');
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  each_group([&](std::int64_t first, std::int64_t size) {
    write(words + first / group * size_of(DType::i4), NibbleWord{row + first, size, scale}.make({row + first, size}));
  });
  return scale;
}

}  // namespace selfattn
