// Reads test cases of attention from a file. The file consists of lines of text. A line that announces an array is
// followed by the bytes of the array.
//
//   selfattn vectors 1
//   case <name>
//   number <name> <value>
//   array <name> f32|f64|f16|bf16|i64|bool <ndim> <extents...>
//   <the elements of the array, little-endian><newline>
//   end
#pragma once
#include <cstdint>
#include <iosfwd>
#include <map>
#include <string>
#include <vector>

#include "guarded_memory.h"
#include "tensor_view.h"

namespace selfattn::test {

// A C-contiguous array whose memory ends at a guard.
class Array {
 public:
  Array(DType dtype, std::vector<std::int64_t> shape);
  DType dtype() const { return dtype_; }
  std::int64_t size() const;
  std::size_t bytes() const { return static_cast<std::size_t>(size() * size_of(dtype_)); }
  char* data() const { return memory_.data(); }
  TensorView view() const;
  double at(std::int64_t i) const;  // only for floating-point types; i counts elements in memory

 private:
  DType dtype_;
  std::vector<std::int64_t> shape_, strides_;
  GuardedMemory memory_;
};

struct VectorCase {
  std::string name;
  std::map<std::string, double> numbers;
  std::map<std::string, Array> arrays;

  double number(const std::string& key, double otherwise) const;
  const Array& array(const std::string& key) const;  // throws if it is missing
  TensorView view(const std::string& key) const;     // an absent view if the array is missing
};

// All cases. Throws std::runtime_error if the file is malformed.
std::vector<VectorCase> read_vectors(const std::string& path);

}  // namespace selfattn::test
