// Turns the bytes of a fuzzer into the shapes of an attention call.
#pragma once
#include <cstddef>
#include <cstdint>

#include "arrays.h"
#include "problem.h"

namespace selfattn::native {

// Reads the input. Beyond its end, all bytes are 0, so that a short input is a plain call.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  int next() { return left_ == 0 ? 0 : (--left_, *data_++); }
  std::int64_t below(std::int64_t n) { return (n > 256 ? next() * 256 + next() : next()) % n; }
  bool flag() { return next() % 2 == 1; }
  template <class T, std::size_t n>
  T one_of(const T (&values)[n]) {
    return values[below(static_cast<std::int64_t>(n))];
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

enum Name { q, k, v, mask, bias, q_offset, q_lens, kv_lens, alibi_slopes, sinks, kv_starts, names };
constexpr int public_names = kv_starts;  // kv_starts comes from a cache, which never passes wrong values

struct Sizes {
  int ndim[3];    // of q, k and v
  Extents batch;  // the batch axes of an operand that is not broadcast
  std::int64_t kv_heads, group, q_len, kv_len, head_dim, value_dim;
};

Sizes read_sizes(Bytes& bytes);

// The arrays of a call. q, k and v are always present.
struct Shapes {
  Extents of[names];
  bool present[names] = {true, true, true};
};

// Replaces some extents by numbers so large that no memory could hold the array. Views with stride 0 can claim them.
void read_claims(Bytes& bytes, Sizes& s);

void read_shapes(Bytes& bytes, const Sizes& s, const AttentionArguments& options, Shapes& shapes);

// Changes a shape in one place, which may make it invalid.
void spoil(Bytes& bytes, Extents& shape);

// Whether NumPy can have an array of this shape: the number of bytes must fit NumPy's integers.
bool expressible(const Extents& shape);

// Whether the call is small enough to be computed.
bool affordable(const Sizes& s, const Shapes& shapes);

}  // namespace selfattn::native
