#include "rope.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "carver.h"
#include "operand.h"
#include "registry.h"
#include "rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

// Tokens of a sequence that are rotated together. Heads may be far apart in memory, and adjacent tokens are close, so
// all tokens of a block are rotated for one head after another.
constexpr std::int64_t block_tokens = 16;

// One for each pair.
struct Factors {
  double *cosines, *sines;
};

// The memory of a thread: the factors of the tokens of a block, and room for one vector before and after its rotation,
// in the type of computation.
struct Memory {
  Factors factors[block_tokens];
  char *before, *after;
  std::size_t bytes;

  Memory(char* base, const Rope& rope, std::int64_t head_dim) {
    Carver carver{base};
    for (auto& [cosines, sines] : factors) {
      cosines = carver.take<double>(rope.rotary_dim / 2);
      sines = carver.take<double>(rope.rotary_dim / 2);
    }
    before = reinterpret_cast<char*>(carver.take<double>(head_dim));
    after = reinterpret_cast<char*>(carver.take<double>(head_dim));
    bytes = carver.used;
  }
};

// Rotates `from` into `to`. Compilers vectorise these loops because the arrays do not overlap.
template <class T>
void rotate_pairs(const Rope& rope, std::int64_t head_dim, const Factors& factors, const char* from, char* to) {
  const std::int64_t half = rope.rotary_dim / 2;
  const T* __restrict x = reinterpret_cast<const T*>(from);
  T* __restrict y = reinterpret_cast<T*>(to);
  const double* __restrict cosines = factors.cosines, * __restrict sines = factors.sines;
  const auto rotate_all = [&](auto first, auto second) {
    for (std::int64_t i = 0; i < half; ++i) {
      const double a = static_cast<double>(x[first(i)]), b = static_cast<double>(x[second(i)]);
      y[first(i)] = static_cast<T>(a * cosines[i] - b * sines[i]);
      y[second(i)] = static_cast<T>(a * sines[i] + b * cosines[i]);
    }
  };
  if (rope.interleaved)
    rotate_all([](std::int64_t i) { return 2 * i; }, [](std::int64_t i) { return 2 * i + 1; });
  else
    rotate_all([](std::int64_t i) { return i; }, [half](std::int64_t i) { return i + half; });
  std::copy(x + rope.rotary_dim, x + head_dim, y + rope.rotary_dim);
}

void rotate_vector(const Rope& rope, const Rotation& rotation, const Factors& factors, const Memory& memory,
                   const char* from, char* to) {
  const KernelSet& kernels = active_kernels();
  const DType dtype = rotation.from.dtype, computed = computed_in(dtype);
  const std::int64_t head_dim = rotation.from.extent(0);
  const auto usable = [&](const char* vector, const TensorView& view) {
    return dtype == computed && are_in_place(vector, dtype, view.stride(0), {});
  };
  const char* x = usable(from, rotation.from) ? from : memory.before;
  char* y = usable(to, rotation.to) && from != to ? to : memory.after;
  if (x != from)
    gather_rows(kernels, memory.before, computed, {{from, 0, rotation.from.stride(0)}, dtype}, 1, head_dim);
  with_type(computed, [&]<class T> { rotate_pairs<T>(rope, head_dim, factors, x, y); });
  if (y != to) scatter_row(kernels, {to, rotation.to.stride(0), dtype}, memory.after, computed, head_dim);
}

// How the tokens of a rotation are divided into blocks. No block has tokens of two sequences.
struct Blocks {
  std::int64_t of_sequence, count;

  explicit Blocks(const TensorView& tokens)
      : of_sequence(ceil_div(tokens.extent(2), block_tokens)), count(of_sequence) {
    for (int axis = 3; axis < tokens.ndim; ++axis) count *= tokens.extent(axis);
  }
};

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
void set_factors(const Rope& rope, const Position& position, bool inverse, const Factors& factors) {
  const double scaling = inverse ? -rope.scaling : rope.scaling;  // of the sines
  for (std::int64_t i = 0; i < rope.rotary_dim / 2; ++i) {
    const std::int64_t coordinate = position[rope.axes ? rope.axes[i] : 0];
    if (rope.frequencies) {
      // Angles are double: at position 2^20 a float angle would be off by 0.06.
      const double angle = static_cast<double>(coordinate) * rope.frequencies[i];
      factors.cosines[i] = rope.scaling * std::cos(angle);
      factors.sines[i] = scaling * std::sin(angle);
    } else {
      factors.cosines[i] = rope.scaling * entry(rope.cosines, coordinate, i);
      factors.sines[i] = scaling * entry(rope.sines, coordinate, i);
    }
  }
}

// The address of a sequence's first vector.
char* sequence_at(const TensorView& view, std::int64_t sequence) {
  char* p = static_cast<char*>(view.data);
  for (int axis = 3; axis < view.ndim; ++axis) {
    p += sequence % view.extent(axis) * view.stride(axis);
    sequence /= view.extent(axis);
  }
  return p;
}

void rotate_block(const Rope& rope, const Rotation& rotation, std::int64_t block, const Memory& memory) {
  const TensorView &from = rotation.from, &to = rotation.to;
  const Blocks blocks(from);
  const std::int64_t sequence = block / blocks.of_sequence, first = block % blocks.of_sequence * block_tokens;
  const std::int64_t count = std::min(block_tokens, from.extent(2) - first);
  for (std::int64_t i = 0; i < count; ++i) {
    const Position position = position_of(rope, rotation, sequence * from.extent(2) + first + i);
    set_factors(rope, position, rotation.inverse, memory.factors[i]);
  }
  const char* source = sequence_at(from, sequence) + first * from.stride(2);
  char* target = sequence_at(to, sequence) + first * to.stride(2);
  for (std::int64_t head = 0; head < from.extent(1); ++head)
    for (std::int64_t i = 0; i < count; ++i)
      rotate_vector(rope, rotation, memory.factors[i], memory, source + head * from.stride(1) + i * from.stride(2),
                    target + head * to.stride(1) + i * to.stride(2));
}

}  // namespace

bool rotate(const Rope& rope, const Rotation* rotations, int count, int num_threads, Interrupted interrupted) {
  std::int64_t blocks = 0, head_dim = 0;
  double tokens = 0;
  for (int i = 0; i < count; ++i) {
    const TensorView& from = rotations[i].from;
    blocks += Blocks(from).count;
    head_dim = std::max(head_dim, from.extent(0));
    double own = 1;
    for (int axis = 2; axis < from.ndim; ++axis) own *= static_cast<double>(from.extent(axis));
    tokens += own;
  }
  static constexpr char kernel = 0;
  const Work work{"rotation", &kernel, tokens * static_cast<double>(rope.rotary_dim) * 100, 0, blocks};
  const int threads = useful_threads(work, num_threads);
  const ThreadScratch scratch(Memory(nullptr, rope, head_dim).bytes, threads);
  TaskLoop loop(work, threads, interrupted);
  const auto body = [&](std::int64_t block, int thread) {
    const Rotation* rotation = rotations;
    for (; block >= Blocks(rotation->from).count; ++rotation) block -= Blocks(rotation->from).count;
    rotate_block(rope, *rotation, block, Memory(scratch.of(thread), rope, head_dim));
  };
  return loop.run(body);
}

}  // namespace selfattn
