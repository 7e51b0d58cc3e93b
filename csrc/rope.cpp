#include "rope.h"

#include <cmath>
#include <cstring>

#include "rows.h"

namespace selfattn {

void rope_tables(const Rope& rope, std::int64_t position, double* cosines, double* sines) noexcept {
  for (std::int64_t i = 0; i < rope.rotary_dim / 2; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(rope.rotary_dim);
    const double angle = static_cast<double>(position) * std::pow(rope.base, exponent);
    cosines[i] = std::cos(angle);
    sines[i] = std::sin(angle);
  }
}

namespace {

template <class Get, class Put>
void rotate(const Rope& rope, std::int64_t head_dim, const double* cosines, const double* sines, Get get, Put put) {
  const std::int64_t half = rope.rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const std::int64_t first = rope.interleaved ? 2 * i : i, second = rope.interleaved ? 2 * i + 1 : i + half;
    const double a = get(first), b = get(second);
    put(first, a * cosines[i] - b * sines[i]);
    put(second, a * sines[i] + b * cosines[i]);
  }
  for (std::int64_t i = rope.rotary_dim; i < head_dim; ++i) put(i, get(i));
}

// Elements of a type that computes.
template <class T>
double element_at(const char* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return static_cast<double>(x);
}
template <class T>
void put_element(char* p, double value) {
  const T x = static_cast<T>(value);
  std::memcpy(p, &x, sizeof x);
}

}  // namespace

void rope_rotate(const Rope& rope, DType dtype, std::int64_t head_dim, const double* cosines, const double* sines,
                 const char* from, std::int64_t from_step, char* to, std::int64_t to_step) noexcept {
  const auto rotate_by = [&](auto read, auto write) {
    rotate(
        rope, head_dim, cosines, sines, [&](std::int64_t i) { return read(from + i * from_step); },
        [&](std::int64_t i, double x) { write(to + i * to_step, x); });
  };
  if (dtype == DType::f32)
    rotate_by([](const char* p) { return element_at<float>(p); }, [](char* p, double x) { put_element<float>(p, x); });
  else if (dtype == DType::f64)
    rotate_by([](const char* p) { return element_at<double>(p); },
              [](char* p, double x) { put_element<double>(p, x); });
  else
    rotate_by([&](const char* p) { return read_real(p, dtype); }, [&](char* p, double x) { write_real(p, x, dtype); });
}

}  // namespace selfattn
