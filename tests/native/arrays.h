// Arrays for the native tests, with any strides. Their memory has exactly the size that they need, so that a sanitizer
// detects accesses outside it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "tensor_view.h"

namespace selfattn::native {

using Extents = std::vector<std::int64_t>;

// Layout of the elements; the default is C order without gaps. Axes for which `gaps`, `negative` or `repeated` has no
// entry get 0 or false.
struct Layout {
  std::vector<int> order{};       // axes from the innermost to the outermost; empty: C order
  Extents gaps{};                 // bytes left unused between the elements of an axis
  std::vector<bool> negative{};   // axes with a negative stride
  std::vector<bool> repeated{};   // axes with stride 0
  std::int64_t misalignment = 0;  // offset of the array from aligned memory, in bytes
};

class Array {
 public:
  Array() = default;  // an absent argument
  Array(DType dtype, Extents shape, const Layout& layout = {});

  explicit operator bool() const { return present_; }
  TensorView view() const;
  DType dtype() const { return dtype_; }
  const Extents& shape() const { return shape_; }
  Extents& shape() { return shape_; }  // to make an array claim a shape that it does not have
  std::int64_t count() const;          // elements, repeated ones included

  // The address of the element at a position in C order.
  char* at(std::int64_t position) const;
  double number(std::int64_t position) const;

  // Calls f(address) once for each distinct element in memory.
  template <class F>
  void each(F f) const {
    const Extents shape = distinct();
    std::int64_t total = 1;
    for (const std::int64_t n : shape) total *= n;
    for (std::int64_t i = 0; i < total; ++i) f(address(shape, i));
  }

  // All bytes, including gaps between the elements, to check that nothing was written to the gaps.
  std::vector<char> bytes() const { return {memory_.get(), memory_.get() + size_}; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  Extents distinct() const;  // the shape with 1 for repeated axes
  char* address(const Extents& shape, std::int64_t position) const;

  bool present_ = false;
  DType dtype_ = DType::f32;
  Extents shape_, strides_;
  std::unique_ptr<char, Free> memory_;
  std::size_t size_ = 0;
  char* first_ = nullptr;
};

// Numbers from a seed, the same on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
  std::uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 33);
  }
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(next()) % n; }
  double real() { return next() / 1073741824.0 - 1; }  // in [-1, 1)

 private:
  std::uint64_t state_;
};

void store(char* address, DType dtype, double x);
double load(const char* address, DType dtype);

}  // namespace selfattn::native
