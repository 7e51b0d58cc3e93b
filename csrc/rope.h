// Rotary position embedding: pairs of elements turn by position / base^(2 i / rotary_dim).
#pragma once
#include <cstdint>

#include "tensor_view.h"

namespace selfattn {

struct Rope {
  double base;
  std::int64_t rotary_dim;  // even, at most head_dim; the elements behind it stay
  bool interleaved;         // pairs (0, 1), (2, 3), ... instead of (0, rotary_dim/2), ...
};

// cos and sin of every pair's angle at one position; each table holds rotary_dim / 2 doubles. Angles and their
// reduction are double: at position 2^20 a float angle would be off by 0.06.
void rope_tables(const Rope& rope, std::int64_t position, double* cosines, double* sines) noexcept;

// Turns one head's vector from `from` to `to`, which may be the same memory; strides in bytes.
void rope_rotate(const Rope& rope, DType dtype, std::int64_t head_dim, const double* cosines, const double* sines,
                 const char* from, std::int64_t from_step, char* to, std::int64_t to_step) noexcept;

}  // namespace selfattn
