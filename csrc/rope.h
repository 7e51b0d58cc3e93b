// Rotary position embedding: rotates each pair of a vector's elements by an angle proportional to the token's position.
#pragma once
#include <cstdint>

#include "task_loop.h"
#include "tensor_view.h"

namespace selfattn {

// How pairs are rotated. Refers to tables of the caller.
struct Rope {
  std::int64_t rotary_dim = 0;  // even, at most head_dim; later elements are not rotated
  bool interleaved = false;     // pairs (0, 1), (2, 3), ... instead of (0, rotary_dim/2), ...
  double scaling = 1;           // factor of the rotated elements
  // The angle of each pair at position 1. If null, the tables below are used: row p is for position p.
  const double* frequencies = nullptr;
  TensorView cosines = {}, sines = {};  // (positions, rotary_dim/2), of any type of real numbers
  // For each pair, the coordinate of the position that rotates it. Null: positions have one coordinate.
  const std::int64_t* axes = nullptr;
};

// Vectors to rotate, (..., tokens, heads, head_dim). `to` has the shape of `from` and may be the same memory.
struct Rotation {
  TensorView from, to;
  // Integers that broadcast to (..., tokens), or absent: 0, 1, 2, ... If the rope has axes, the array has an additional
  // first axis for the coordinates. If positions are absent, all coordinates of a token are equal.
  TensorView positions;
  const std::int64_t* ends = nullptr;  // without positions: the last token of sequence b has position ends[b] - 1
  bool inverse = false;                // rotate by the negative angles
};

// Rotates every vector by the position of its token. Results do not depend on the number of threads. Returns false if
// interrupted. Throws std::bad_alloc.
bool rotate(const Rope& rope, const Rotation* rotations, int count, int num_threads, Interrupted interrupted);

}  // namespace selfattn
