#include "rope.h"

#include <cmath>
#include <cstring>

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

template <class T>
void rotate(const Rope& rope, std::int64_t head_dim, const double* cosines, const double* sines, const char* from,
            std::int64_t from_step, char* to, std::int64_t to_step) {
  const auto get = [&](std::int64_t i) {
    T x;
    std::memcpy(&x, from + i * from_step, sizeof x);
    return x;
  };
  const auto put = [&](std::int64_t i, T x) { std::memcpy(to + i * to_step, &x, sizeof x); };
  const std::int64_t half = rope.rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const std::int64_t first = rope.interleaved ? 2 * i : i, second = rope.interleaved ? 2 * i + 1 : i + half;
    const double a = static_cast<double>(get(first)), b = static_cast<double>(get(second));
    put(first, static_cast<T>(a * cosines[i] - b * sines[i]));
    put(second, static_cast<T>(a * sines[i] + b * cosines[i]));
  }
  for (std::int64_t i = rope.rotary_dim; i < head_dim; ++i) put(i, get(i));
}

}  // namespace

void rope_rotate(const Rope& rope, DType dtype, std::int64_t head_dim, const double* cosines, const double* sines,
                 const char* from, std::int64_t from_step, char* to, std::int64_t to_step) noexcept {
  if (dtype == DType::f32)
    rotate<float>(rope, head_dim, cosines, sines, from, from_step, to, to_step);
  else
    rotate<double>(rope, head_dim, cosines, sines, from, from_step, to, to_step);
}

}  // namespace selfattn
