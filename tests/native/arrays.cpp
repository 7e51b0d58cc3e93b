#include "arrays.h"

#include <new>
#include <numeric>

#include "rows.h"

namespace selfattn::native {

Array::Array(DType dtype, Extents shape, const Layout& layout)
    : present_(true), dtype_(dtype), shape_(std::move(shape)), strides_(shape_.size()) {
  const std::size_t ndim = shape_.size();
  std::vector<int> order = layout.order;
  if (order.empty()) {
    order.resize(ndim);
    std::iota(order.rbegin(), order.rend(), 0);
  }
  const auto flag = [](const std::vector<bool>& flags, std::size_t i) { return i < flags.size() && flags[i]; };
  std::int64_t span = size_of(dtype), origin = layout.misalignment;
  for (const int signed_axis : order) {
    const auto axis = static_cast<std::size_t>(signed_axis);
    if (flag(layout.repeated, axis)) continue;
    const std::int64_t steps = shape_[axis] > 0 ? shape_[axis] - 1 : 0;
    const std::int64_t stride = span + (axis < layout.gaps.size() ? layout.gaps[axis] : 0);
    span += steps * stride;
    if (flag(layout.negative, axis)) origin += steps * stride;
    strides_[axis] = flag(layout.negative, axis) ? -stride : stride;
  }
  size_ = static_cast<std::size_t>(span + layout.misalignment);
  memory_.reset(static_cast<char*>(std::malloc(size_)));
  if (!memory_) throw std::bad_alloc();
  std::memset(memory_.get(), 0xff, size_);  // NaN, or an invalid bool
  first_ = memory_.get() + origin;
}

TensorView Array::view() const {
  if (!present_) return {};
  return {first_, dtype_, static_cast<int>(shape_.size()), shape_.data(), strides_.data()};
}

std::int64_t Array::count() const {
  std::int64_t total = 1;
  for (const std::int64_t n : shape_) total *= n;
  return total;
}

Extents Array::distinct() const {
  Extents shape = shape_;
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (strides_[axis] == 0 && shape[axis] > 1) shape[axis] = 1;
  return shape;
}

char* Array::address(const Extents& shape, std::int64_t position) const {
  char* p = first_;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    p += position % shape[axis] * strides_[axis];
    position /= shape[axis];
  }
  return p;
}

char* Array::at(std::int64_t position) const { return address(shape_, position); }

double Array::number(std::int64_t position) const { return load(at(position), dtype_); }

void store(char* address, DType dtype, double x) {
  const auto put = [&](auto value) { std::memcpy(address, &value, sizeof value); };
  switch (dtype) {
    case DType::f32:
      return put(static_cast<float>(x));
    case DType::f64:
      return put(x);
    case DType::f16:
    case DType::bf16:
      return write_real(address, x, dtype);
    case DType::i64:
      return put(static_cast<std::int64_t>(x));
    case DType::i8:
      return put(static_cast<std::int8_t>(x));
    case DType::i4:  // has no elements with an address
      return;
    case DType::boolean:
      return put(static_cast<std::uint8_t>(x != 0));
  }
}

double load(const char* address, DType dtype) {
  const auto get = [&](auto value) {
    std::memcpy(&value, address, sizeof value);
    return static_cast<double>(value);
  };
  switch (dtype) {
    case DType::f32:
      return get(0.0f);
    case DType::f64:
      return get(0.0);
    case DType::f16:
    case DType::bf16:
      return read_real(address, dtype);
    case DType::i64:
      return get(std::int64_t{0});
    case DType::i8:
      return get(std::int8_t{0});
    case DType::i4:
      break;
    case DType::boolean:
      return get(std::uint8_t{0});
  }
  return 0;
}

}  // namespace selfattn::native
