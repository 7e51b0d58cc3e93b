// The core's view of an array: its memory, type, shape and strides. Owns nothing.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace selfattn {

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = -1;  // -1: the argument is absent; 0 is a scalar, whose shape may be null
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;  // bytes; of the last axis of a cache's rows: from one word to the next

  explicit operator bool() const { return ndim >= 0; }
  // Counted from the end: axis 0 is the last one.
  std::int64_t extent(int from_end) const { return shape[ndim - 1 - from_end]; }
  std::int64_t stride(int from_end) const { return strides[ndim - 1 - from_end]; }
};

}  // namespace selfattn
