// A call of a handler by XLA: its arrays, as the core sees them, and its attributes.
#pragma once
#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/xla_ffi.h"
#include "message.h"
#include "problem.h"

namespace selfattn::xla {

constexpr const char* function = "dot_product_attention";

inline DType dtype_of(Type type) {
  switch (type) {
    case Type::boolean:
      return DType::boolean;
    case Type::f16:
      return DType::f16;
    case Type::bf16:
      return DType::bf16;
    case Type::f32:
      return DType::f32;
    case Type::f64:
      return DType::f64;
    case Type::i64:
      return DType::i64;
    default:
      refuse(function, "XLA passed an array of the unexpected type ", static_cast<int>(type));
  }
}

// A view of a row-major array, with the shape and strides that the view points to.
struct Array {
  TensorView view;
  std::int64_t extents[max_axes];
  std::int64_t strides[max_axes];

  Array(void* data, DType dtype, const std::int64_t* shape, std::int64_t rank) {
    // XLA may give empty arrays no memory, but for the core null means that there is no array.
    alignas(64) static char nothing[64];
    if (rank < 0 || rank > max_axes)
      refuse(function, "an array has ", rank, " dimensions, those of jax.vmap included, but at most ", max_axes,
             " are possible");
    std::int64_t stride = size_of(dtype);
    for (std::int64_t axis = rank - 1; axis >= 0; --axis) {
      extents[axis] = shape[axis];
      strides[axis] = stride;
      stride *= std::max<std::int64_t>(shape[axis], 1);
    }
    view = {data ? data : nothing, dtype, static_cast<int>(rank), extents, strides};
  }
  explicit Array(const Buffer& buffer) : Array(buffer.data, dtype_of(buffer.type), buffer.extents, buffer.rank) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  // Broadcasts leading axes of extent 1 to `shape`.
  void repeat(const std::int64_t* shape, int axes) {
    for (int axis = 0; axis < axes; ++axis) {
      if (extents[axis] == 1) strides[axis] = 0;
      extents[axis] = shape[axis];
    }
  }
};

// JAX has no float64 by default, so log-sum-exps are passed as pairs of 32-bit integers. Each pair holds the bits of
// one float64.
struct Doubles : Array {
  explicit Doubles(const Buffer& buffer) : Array(buffer.data, DType::f64, buffer.extents, buffer.rank - 1) {}
};

// Lengths as int64.
struct Lengths {
  std::vector<std::int64_t> numbers;
  Array array;

  explicit Lengths(const Buffer& buffer)
      : numbers(read(buffer)), array(numbers.data(), DType::i64, buffer.extents, buffer.rank) {}

 private:
  static std::vector<std::int64_t> read(const Buffer& buffer) {
    std::int64_t count = 1;
    for (std::int64_t axis = 0; axis < buffer.rank; ++axis) count *= buffer.extents[axis];
    const auto copy = [&](const auto* from) { return std::vector<std::int64_t>(from, from + count); };
    if (buffer.type == Type::i32) return copy(static_cast<const std::int32_t*>(buffer.data));
    return copy(static_cast<const std::int64_t*>(buffer.data));
  }
};

// make_problem, but errors use JAX's names for arguments.
inline Problem problem_of(const AttentionArguments& arguments) {
  struct Name {
    std::string_view ours, theirs;
  };
  static constexpr Name names[] = {{"q", "query"},
                                   {"k", "key"},
                                   {"v", "value"},
                                   {"q_lens", "query_seq_lengths"},
                                   {"kv_lens", "key_value_seq_lengths"}};
  try {
    return make_problem(arguments);
  } catch (const Refusal& refusal) {
    Message message = refusal.message();
    for (std::size_t i = 2; i < message.size(); i += 2) {  // the first name is the function's
      const auto* const found = std::ranges::find(names, message[i], &Name::ours);
      if (found != std::end(names)) message[i] = found->theirs;
    }
    throw Refusal(std::move(message));
  }
}

class Call {
 public:
  explicit Call(const CallFrame& frame) : frame_(frame) {}

  template <class T>
  T attribute(std::string_view name) const {
    const Attributes& all = frame_.attributes;
    for (std::int64_t i = 0; i < all.count; ++i)
      if (name == std::string_view(all.names[i]->text, all.names[i]->length) && all.kinds[i] == scalar_kind) {
        T value;
        std::memcpy(&value, static_cast<const Scalar*>(all.values[i])->value, sizeof value);
        return value;
      }
    refuse(function, "XLA passed no attribute ", name);
  }

  const Buffer& argument(std::int64_t i) const { return *frame_.arguments.buffers[i]; }
  const Buffer& result(std::int64_t i) const { return *frame_.results.buffers[i]; }
  std::int64_t results() const { return frame_.results.count; }
  bool is_set(std::string_view flags, std::int64_t bit) const { return attribute<std::int64_t>(flags) & bit; }

  // The extents of the batch axes. jax.vmap adds a leading axis to every array. Its extent is 1 in arrays that
  // are not mapped.
  Shape batch(std::int64_t axes) const {
    Shape shape;
    for (std::int64_t axis = 0; axis < axes; ++axis) {
      std::int64_t extent = 1;
      for (const Buffers* buffers : {&frame_.arguments, &frame_.results})
        for (std::int64_t i = 0; i < buffers->count; ++i)
          if (buffers->buffers[i]->extents[axis] != 1) extent = buffers->buffers[i]->extents[axis];
      shape.append(extent);
    }
    return shape;
  }

 private:
  const CallFrame& frame_;
};

}  // namespace selfattn::xla
