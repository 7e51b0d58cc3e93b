// Rotary position embedding: rotates pair i of a vector's elements by the angle position / base^(2 i / rotary_dim).
#pragma once
#include <cstdint>

#include "task_loop.h"
#include "tensor_view.h"

namespace selfattn {

struct Rope {
  double base;
  std::int64_t rotary_dim;  // even, at most head_dim; later elements are not rotated
  bool interleaved;         // pairs (0, 1), (2, 3), ... instead of (0, rotary_dim/2), ...
};

// Vectors to rotate, (..., tokens, heads, head_dim). `to` has the shape of `from` and may be the same memory.
struct Rotation {
  TensorView from, to;
  TensorView positions;                // integers that broadcast to (..., tokens), or absent: 0, 1, 2, ...
  const std::int64_t* ends = nullptr;  // without positions: the last token of sequence b has position ends[b] - 1
  bool inverse = false;                // rotate by the negative angles
};

// Rotates every vector by the position of its token. Results do not depend on the number of threads. Returns false if
// interrupted. Throws std::bad_alloc.
bool rotate(const Rope& rope, const Rotation* rotations, int count, int num_threads, Interrupted interrupted);

}  // namespace selfattn
