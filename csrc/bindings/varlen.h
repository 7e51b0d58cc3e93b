// Sequences of different lengths in packed arrays, for attention_varlen() and its gradients.
#pragma once
#include <memory>
#include <new>

#include "bindings/operands.h"
#include "bindings/options.h"
#include "problem.h"
#include "scratch_pool.h"

namespace selfattn::bindings {

// The rows [first, first + count) of a packed array (total, heads, dim).
struct RowsOf {
  std::int64_t shape[3], strides[3];
  TensorView view;

  RowsOf(const TensorView& packed, std::int64_t first, std::int64_t count)
      : shape{count, packed.shape[1], packed.shape[2]},
        strides{packed.strides[0], packed.strides[1], packed.strides[2]},
        view{static_cast<char*>(packed.data) + first * packed.strides[0], packed.dtype, 3, shape, strides} {}
  RowsOf(const RowsOf&) = delete;  // the view points into this object
  RowsOf& operator=(const RowsOf&) = delete;
};

// The columns [first, first + count) of a packed array (heads, total).
struct LseOf {
  std::int64_t shape[2];
  TensorView view;
  LseOf(const TensorView& packed, std::int64_t first, std::int64_t count)
      : shape{packed.shape[0], count},
        view{static_cast<char*>(packed.data) + first * packed.strides[1], packed.dtype, 2, shape, packed.strides} {}
  LseOf(const LseOf&) = delete;
  LseOf& operator=(const LseOf&) = delete;
};

// One T for each sequence of a call, in memory that later calls reuse.
template <class T>
class PerSequence {
 public:
  explicit PerSequence(std::size_t count)
      : memory_(static_cast<std::size_t>(bytes_of(count + 1, sizeof(T)))),
        items_(reinterpret_cast<T*>(memory_.data())) {}
  ~PerSequence() { std::destroy_n(items_, made_); }
  PerSequence(const PerSequence&) = delete;
  PerSequence& operator=(const PerSequence&) = delete;

  // Constructs item i. The caller constructs the items in order: 0, 1, ...
  template <class... Arguments>
  T& make(std::size_t i, Arguments&&... arguments) {
    ::new (items_ + i) T{arguments...};
    ++made_;
    return items_[i];
  }
  T& operator[](std::size_t i) { return items_[i]; }
  T* data() { return items_; }

 private:
  const Scratch memory_;
  T* const items_;
  std::size_t made_ = 0;
};

struct Sequence;

// The operands of a call.
class Packed {
 public:
  // `inputs` must outlive this object.
  Packed(const char* function, const VarlenInputs& inputs);

  const TensorView q, k, v;
  const std::int64_t *const queries, *const keys;  // the first row of each sequence, then the total
  const std::size_t count;

  std::int64_t queries_of(std::size_t i) const { return queries[i + 1] - queries[i]; }
  std::int64_t keys_of(std::size_t i) const { return keys[i + 1] - keys[i]; }
  Shape lse_shape() const;

  // The arguments of one sequence. `sequence` must outlive them.
  AttentionArguments arguments(const Options& options, std::size_t i, Sequence& sequence) const;

 private:
  const char* const function_;
  const VarlenInputs& inputs_;
};

// One sequence: its rows of q, k and v, and what to compute.
struct Sequence {
  RowsOf query, key, value;
  std::int64_t slope_stride = 0;
  AttentionArguments arguments;
  Problem problem;

  // Throws like make_problem; messages name the sequence as well.
  Sequence(const Packed& packed, const Options& options, std::size_t i);
};

}  // namespace selfattn::bindings
