#include "rope.h"

#include <cmath>
#include <cstring>

#include "rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

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
  const std::int64_t from_stride = rotation.from.stride(0), to_stride = rotation.to.stride(0);
  const auto rotate_by = [&](auto read, auto write) {
    rotate_pairs(
        rope, rotation.from.extent(0), cosines, cosines + rope.rotary_dim / 2,
        [&](std::int64_t i) { return read(from + i * from_stride); },
        [&](std::int64_t i, double x) { write(to + i * to_stride, x); });
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

// The position of one token. It has several coordinates if the rope has axes.
struct Position {
  std::int64_t index;       // the value of all coordinates, if there is no array
  const char* coordinates;  // or null
  std::int64_t stride;      // from one coordinate to the next

  std::int64_t operator[](std::int64_t axis) const {
    if (!coordinates) return index;
    std::int64_t coordinate;
    std::memcpy(&coordinate, coordinates + axis * stride, sizeof coordinate);
    return coordinate;
  }
};

Position position_of(const Rope& rope, const Rotation& rotation, std::int64_t token) {
  const std::int64_t length = rotation.from.extent(2);
  const TensorView& positions = rotation.positions;
  if (!positions) return {token % length + (rotation.ends ? rotation.ends[token / length] - length : 0), nullptr, 0};
  const int axes = positions.ndim - (rope.axes ? 1 : 0);
  const char* p = static_cast<const char*>(positions.data);
  for (int axis = 0; axis < axes; ++axis) {
    const std::int64_t extent = rotation.from.extent(axis + 2);
    if (positions.extent(axis) != 1) p += token % extent * positions.stride(axis);
    token /= extent;
  }
  return {0, p, rope.axes && positions.shape[0] != 1 ? positions.strides[0] : 0};
}

double entry(const TensorView& table, std::int64_t row, std::int64_t column) {
  const char* data = static_cast<const char*>(table.data);
  return read_real(data + row * table.stride(1) + column * table.stride(0), table.dtype);
}

// Sets the factors of each pair.
void set_factors(const Rope& rope, const Position& position, bool inverse, double* cosines, double* sines) {
  const double scaling = inverse ? -rope.scaling : rope.scaling;  // of the sines
  for (std::int64_t i = 0; i < rope.rotary_dim / 2; ++i) {
    const std::int64_t coordinate = position[rope.axes ? rope.axes[i] : 0];
    if (rope.frequencies) {
      // Angles are double: at position 2^20 a float angle would be off by 0.06.
      const double angle = static_cast<double>(coordinate) * rope.frequencies[i];
      cosines[i] = rope.scaling * std::cos(angle);
      sines[i] = scaling * std::sin(angle);
    } else {
      cosines[i] = rope.scaling * entry(rope.cosines, coordinate, i);
      sines[i] = scaling * entry(rope.sines, coordinate, i);
    }
  }
}

// Rotates all heads of one token. `cosines` has room for rotary_dim doubles; its second half is for the sines.
void rotate_token(const Rope& rope, const Rotation& rotation, std::int64_t token, double* cosines) {
  set_factors(rope, position_of(rope, rotation, token), rotation.inverse, cosines, cosines + rope.rotary_dim / 2);
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
  const Work work{"rotation", &kernel, static_cast<double>(tokens) * static_cast<double>(rope.rotary_dim) * 100, 0,
                  tokens};
  const int threads = useful_threads(work, num_threads);
  const ThreadScratch factors(static_cast<std::size_t>(bytes_of(rope.rotary_dim, sizeof(double))), threads);
  TaskLoop loop(work, threads, interrupted);
  const auto body = [&](std::int64_t token, int thread) {
    const Rotation* rotation = rotations;
    for (; token >= token_count(*rotation); ++rotation) token -= token_count(*rotation);
    rotate_token(rope, *rotation, token, reinterpret_cast<double*>(factors.of(thread)));
  };
  return loop.run(body);
}

}  // namespace selfattn
