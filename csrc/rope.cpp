#include "rope.h"

#include <cmath>
#include <cstring>

#include "carver.h"
#include "rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

// Angle of pair i at position 1. Angles are double: at position 2^20 a float angle would be off by 0.06.
void set_frequencies(const Rope& rope, double* frequencies) {
  for (std::int64_t i = 0; i < rope.rotary_dim / 2; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(rope.rotary_dim);
    frequencies[i] = std::pow(rope.base, exponent);
  }
}

template <class Get, class Put>
void rotate_pairs(const Rope& rope, std::int64_t head_dim, const double* cosines, const double* sines, Get get,
                  Put put) {
  const std::int64_t half = rope.rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const std::int64_t first = rope.interleaved ? 2 * i : i, second = rope.interleaved ? 2 * i + 1 : i + half;
    const double a = get(first), b = get(second);
    put(first, a * cosines[i] - b * sines[i]);
    put(second, a * sines[i] + b * cosines[i]);
  }
  for (std::int64_t i = rope.rotary_dim; i < head_dim; ++i) put(i, get(i));
}

// Elements of a type of computation: float or double.
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

// Rotates one vector. In `cosines`, the sines follow the cosines.
void rotate_vector(const Rope& rope, const Rotation& rotation, const double* cosines, const char* from, char* to) {
  const DType dtype = rotation.from.dtype;
  const std::int64_t from_step = rotation.from.stride(0), to_step = rotation.to.stride(0);
  const auto rotate_by = [&](auto read, auto write) {
    rotate_pairs(
        rope, rotation.from.extent(0), cosines, cosines + rope.rotary_dim / 2,
        [&](std::int64_t i) { return read(from + i * from_step); },
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

std::int64_t token_count(const Rotation& rotation) {
  std::int64_t tokens = 1;
  for (int axis = 2; axis < rotation.from.ndim; ++axis) tokens *= rotation.from.extent(axis);
  return tokens;
}

std::int64_t position_of(const Rotation& rotation, std::int64_t token) {
  const std::int64_t length = rotation.from.extent(2);
  if (!rotation.positions) return token % length + (rotation.ends ? rotation.ends[token / length] - length : 0);
  const char* p = static_cast<const char*>(rotation.positions.data);
  for (int axis = 0; axis < rotation.positions.ndim; ++axis) {
    const std::int64_t extent = rotation.from.extent(axis + 2);
    if (rotation.positions.extent(axis) != 1) p += token % extent * rotation.positions.stride(axis);
    token /= extent;
  }
  std::int64_t position;
  std::memcpy(&position, p, sizeof position);
  return position;
}

// Rotates all heads of one token. `cosines` has room for rotary_dim doubles; its second half is for the sines.
void rotate_token(const Rope& rope, const Rotation& rotation, std::int64_t token, const double* frequencies,
                  double* cosines) {
  const std::int64_t half = rope.rotary_dim / 2;
  double* sines = cosines + half;
  const auto position = static_cast<double>(position_of(rotation, token));
  for (std::int64_t i = 0; i < half; ++i) {
    const double angle = position * frequencies[i];
    cosines[i] = std::cos(angle);
    sines[i] = std::sin(rotation.inverse ? -angle : angle);
  }
  const TensorView &from = rotation.from, &to = rotation.to;
  const char* source = static_cast<const char*>(from.data);
  char* target = static_cast<char*>(to.data);
  for (int axis = 2; axis < from.ndim; ++axis) {
    const std::int64_t i = token % from.extent(axis);
    token /= from.extent(axis);
    source += i * from.stride(axis);
    target += i * to.stride(axis);
  }
  for (std::int64_t head = 0; head < from.extent(1); ++head)
    rotate_vector(rope, rotation, cosines, source + head * from.stride(1), target + head * to.stride(1));
}

}  // namespace

bool rotate(const Rope& rope, const Rotation* rotations, int count, int num_threads, Interrupted interrupted) {
  std::int64_t tokens = 0;
  for (int i = 0; i < count; ++i) tokens += token_count(rotations[i]);
  static constexpr char kernel = 0;
  const Work work{&kernel, static_cast<double>(tokens) * static_cast<double>(rope.rotary_dim) * 100, 0, tokens};
  const int threads = useful_threads(work, num_threads);
  double *frequencies = nullptr, *cosines = nullptr;  // each thread has cosines of its own
  const auto divide = [&](char* base) {
    Carver carver{base};
    frequencies = carver.take<double>(rope.rotary_dim / 2);
    cosines = carver.take<double>(rope.rotary_dim * threads);
    return carver.used;
  };
  const Scratch memory(divide(nullptr));
  divide(memory.data());
  set_frequencies(rope, frequencies);
  TaskLoop loop(work, threads, interrupted);
  const auto body = [&](std::int64_t token, int thread) {
    const Rotation* rotation = rotations;
    for (; token >= token_count(*rotation); ++rotation) token -= token_count(*rotation);
    rotate_token(rope, *rotation, token, frequencies, cosines + thread * rope.rotary_dim);
  };
  return loop.run(body);
}

}  // namespace selfattn
