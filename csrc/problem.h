// What to compute: the arguments of an attention call, checked and brought to one form
//   query (batch, num_heads, q_len, head_dim)      key (batch, num_kv_heads, kv_len, head_dim)
//   out   (batch, num_heads, q_len, value_dim)     value (batch, num_kv_heads, kv_len, value_dim)
// where batch stands for any number of leading axes and every operand keeps its own strides.
#pragma once
#include <cstdint>
#include <string>

#include "tensor_view.h"

namespace selfattn {

constexpr int max_axes = 64;  // NumPy's own limit

struct Shape {
  int ndim = 0;
  std::int64_t extent[max_axes];
  void append(std::int64_t n) { extent[ndim++] = n; }
};

// One array seen in the problem's form; an axis that it lacks or broadcasts has stride 0. All strides in bytes.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t head = 0;
  std::int64_t row = 0;
  std::int64_t column = 0;
  std::int64_t batch[max_axes];  // the first Problem::batch_axes are set

  explicit operator bool() const { return data != nullptr; }
};

// As received: shapes are not yet trusted.
// What float32 products may be rounded to, where that is faster.
enum class Precision : std::uint8_t { highest, high, medium };

struct AttentionArguments {
  const char* function = "attention";  // whom messages name
  TensorView q, k, v, mask, bias, q_offset, q_lens, kv_lens, alibi_slopes, sinks;
  bool bshd = false;
  bool causal = false;
  std::int64_t window_left = -1;  // -1: unbounded
  std::int64_t window_right = -1;
  bool has_scale = false;
  double scale = 0;
  double softcap = 0;  // 0: none
  Precision precision = Precision::highest;
};

struct Problem {
  DType dtype = DType::f32;  // of the computation, of lse and of weights
  int ndim = 0;              // of out
  bool bshd = false;
  int batch_axes = 0;
  std::int64_t batch_shape[max_axes];
  std::int64_t batch = 1;
  std::int64_t num_heads = 0, num_kv_heads = 0, group_size = 0;
  std::int64_t q_len = 0, kv_len = 0, head_dim = 0, value_dim = 0;
  Operand query, key, value, mask, bias, q_offset, q_lens, kv_lens, alibi_slopes, sinks;
  Operand out, lse, weights;  // lse and weights may be absent
  bool causal = false;
  std::int64_t window_left = -1, window_right = -1;
  double scale = 0;
  double softcap = 0;
  Precision precision = Precision::highest;

  char* at(const Operand& operand, std::int64_t batch_index) const {
    char* p = operand.data;
    for (int axis = batch_axes - 1; axis >= 0; --axis) {
      p += batch_index % batch_shape[axis] * operand.batch[axis];
      batch_index /= batch_shape[axis];
    }
    return p;
  }
  std::int64_t keys_of(std::int64_t batch_index) const;     // valid keys of a batch entry
  std::int64_t queries_of(std::int64_t batch_index) const;  // valid queries
  std::int64_t offset_of(std::int64_t batch_index) const;   // key aligned with query 0
};

// Throws std::invalid_argument with a message that names function, argument, value and rule.
Problem make_problem(const AttentionArguments& arguments);

Shape out_shape(const Problem& problem);
Shape lse_shape(const Problem& problem);
Shape weights_shape(const Problem& problem);

void attach_out(Problem& problem, const TensorView& out);
void attach_lse(Problem& problem, const TensorView& lse);
void attach_weights(Problem& problem, const TensorView& weights);

// The keys [begin, end) that query `row` of a batch entry may see before mask and bias; empty: begin == end.
struct KeyRange {
  std::int64_t begin, end;
};
KeyRange visible_keys(const Problem& problem, std::int64_t query, std::int64_t offset, std::int64_t valid_keys);

}  // namespace selfattn
