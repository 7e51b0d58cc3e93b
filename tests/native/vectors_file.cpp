#include "vectors_file.h"

#include <fstream>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "rows.h"

namespace selfattn::test {
namespace {

constexpr int most_axes = 8;

std::int64_t product(const std::vector<std::int64_t>& extents) {
  std::int64_t size = 1;
  for (const std::int64_t extent : extents) size *= extent;
  return size;
}

DType dtype_named(const std::string& name) {
  if (name == "f32") return DType::f32;
  if (name == "f64") return DType::f64;
  if (name == "f16") return DType::f16;
  if (name == "bf16") return DType::bf16;
  if (name == "i64") return DType::i64;
  if (name == "bool") return DType::boolean;
  throw std::runtime_error("unknown element type '" + name + "'");
}

std::pair<std::string, Array> read_array(std::istringstream& line, std::istream& file) {
  std::string name, dtype;
  int ndim = 0;
  line >> name >> dtype >> ndim;
  if (ndim < 0 || ndim > most_axes) throw std::runtime_error("array '" + name + "' has too many dimensions");
  std::vector<std::int64_t> shape(static_cast<std::size_t>(ndim));
  for (std::int64_t& extent : shape) line >> extent;
  if (!line) throw std::runtime_error("array '" + name + "' has no shape");
  Array array(dtype_named(dtype), std::move(shape));
  file.read(array.data(), static_cast<std::streamsize>(array.bytes()));
  if (!file || file.get() != '\n') throw std::runtime_error("array '" + name + "' is cut off");
  return {std::move(name), std::move(array)};
}

VectorCase read_case(const std::string& name, std::istream& file) {
  VectorCase c;
  c.name = name;
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string kind, key;
    line >> kind;
    if (kind == "end") return c;
    if (kind == "array") {
      c.arrays.insert(read_array(line, file));
    } else if (double value = 0; kind == "number" && line >> key >> value) {
      c.numbers[key] = value;
    } else {
      throw std::runtime_error("case '" + name + "': cannot read '" + text + "'");
    }
  }
  throw std::runtime_error("case '" + name + "' has no end");
}

}  // namespace

Array::Array(DType dtype, std::vector<std::int64_t> shape)
    : dtype_(dtype),
      shape_(std::move(shape)),
      strides_(shape_.size()),
      memory_(static_cast<std::size_t>(product(shape_) * size_of(dtype))) {
  std::int64_t stride = size_of(dtype);
  for (std::size_t axis = shape_.size(); axis-- > 0; stride *= shape_[axis]) strides_[axis] = stride;
}

std::int64_t Array::size() const { return product(shape_); }

TensorView Array::view() const {
  return {memory_.data(), dtype_, static_cast<int>(shape_.size()), shape_.data(), strides_.data()};
}

double Array::at(std::int64_t i) const { return read_real(data() + i * size_of(dtype_), dtype_); }

double VectorCase::number(const std::string& key, double otherwise) const {
  const auto found = numbers.find(key);
  return found == numbers.end() ? otherwise : found->second;
}

const Array& VectorCase::array(const std::string& key) const {
  const auto found = arrays.find(key);
  if (found == arrays.end()) throw std::runtime_error("case '" + name + "' has no array '" + key + "'");
  return found->second;
}

TensorView VectorCase::view(const std::string& key) const {
  const auto found = arrays.find(key);
  return found == arrays.end() ? TensorView{} : found->second.view();
}

std::vector<VectorCase> read_vectors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text;
  if (!std::getline(file, text) || text != "selfattn vectors 1")
    throw std::runtime_error(path + " is not a file that tests/native/write_vectors.py wrote");
  std::vector<VectorCase> cases;
  while (std::getline(file, text)) {
    if (text.rfind("case ", 0) != 0) throw std::runtime_error("a case should begin at '" + text + "'");
    cases.push_back(read_case(text.substr(5), file));
  }
  return cases;
}

}  // namespace selfattn::test
