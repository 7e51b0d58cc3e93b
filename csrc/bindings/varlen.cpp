// attention_varlen(): sequences of different lengths in one call, each computed as if it were alone.
#include <new>
#include <stdexcept>
#include <string>

#include "attend.h"
#include "bindings/attention.h"
#include "message.h"
#include "registry.h"
#include "scratch_pool.h"

namespace selfattn::bindings {
namespace {

constexpr const char* function = "attention_varlen";

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

struct Sequence {
  RowsOf query, key, value;
  Problem problem;
  Plan plan{};

  Sequence(const TensorView& q, const TensorView& k, const TensorView& v, std::int64_t query_row, std::int64_t q_len,
           std::int64_t key_row, std::int64_t kv_len)
      : query(q, query_row, q_len), key(k, key_row, kv_len), value(v, key_row, kv_len) {}
};

// Options that differ from sequence to sequence: lists of arrays or None, and arrays whose first axis is the sequences.
struct OwnOptions {
  py::object masks, biases, q_offsets, alibi_slopes;

  void apply(AttentionArguments& arguments, std::size_t i, std::int64_t (&step)[1]) const {
    if (!masks.is_none()) arguments.mask = bool_view(function, "mask", masks[py::int_(i)]);
    if (!biases.is_none()) {
      const py::object bias = biases[py::int_(i)];
      if (!bias.is_none()) arguments.bias = float_view(function, "bias", bias);
    }
    if (!q_offsets.is_none()) {
      const TensorView all = optional_view(q_offsets, DType::i64);
      arguments.q_offset = {static_cast<char*>(all.data) + static_cast<std::int64_t>(i) * all.stride(0), DType::i64, 0,
                            nullptr, nullptr};
    }
    if (!alibi_slopes.is_none()) {
      const TensorView all = optional_view(alibi_slopes, DType::f64);
      step[0] = all.stride(0);
      arguments.alibi_slopes = {static_cast<char*>(all.data) + static_cast<std::int64_t>(i) * all.stride(1), DType::f64,
                                1, all.shape + 1, step};
    }
  }
};

// The sequences of a call, in memory that later calls reuse.
class Sequences {
 public:
  explicit Sequences(std::size_t count)
      : count_(count),
        memory_(static_cast<std::size_t>(bytes_of(count + 1, sizeof(Sequence) + sizeof(Job)))),
        sequences_(reinterpret_cast<Sequence*>(memory_.data())),
        jobs_(reinterpret_cast<Job*>(memory_.data() + bytes_of(count, sizeof(Sequence)))) {}

  Sequence& make(std::size_t i, const TensorView& q, const TensorView& k, const TensorView& v,
                 const std::int64_t* queries, const std::int64_t* keys) {
    const std::int64_t q_len = queries[i + 1] - queries[i], kv_len = keys[i + 1] - keys[i];
    return *::new (sequences_ + i) Sequence(q, k, v, queries[i], q_len, keys[i], kv_len);
  }
  Sequence& operator[](std::size_t i) { return sequences_[i]; }

  bool run(const KernelSet& kernels, int num_threads) {
    const auto count = static_cast<std::int64_t>(count_);
    for (std::size_t i = 0; i < count_; ++i) {
      sequences_[i].plan = make_plan(sequences_[i].problem, kernels, 1);
      ::new (jobs_ + i) Job{&sequences_[i].problem, &sequences_[i].plan};
    }
    double flops = 0;
    for (std::size_t i = 0; i < count_; ++i) flops += sequences_[i].plan.flops;
    const int threads = threads_for(jobs_, count, num_threads);
    const CoreCall call_of_core(flops);
    return attend(jobs_, count, threads, interrupted);
  }

 private:
  const std::size_t count_;
  const Scratch memory_;
  Sequence* const sequences_;
  Job* const jobs_;
};

TensorView packed_view(const char* name, const TensorView& view) {
  if (view.ndim != 3)
    refuse(function, name, " has shape ", shape_text(view), " but needs 3 dimensions (total, heads, head_dim)");
  return view;
}

// Like make_problem, but error messages name the sequence as well.
Problem problem_of(const AttentionArguments& arguments, std::size_t i) {
  try {
    return make_problem(arguments);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(error.what() + (" (sequence " + std::to_string(i) + ")"));
  }
}

// inputs: q, k, v, cu_seqlens_q, cu_seqlens_k, masks, biases, q_offsets, alibi_slopes. The last four replace the
// options of the same names, which are None in `option_values`.
py::object attention_varlen(const py::tuple& inputs, py::object out, py::handle option_values) {
  const Options& options = options_of(option_values);
  const TensorView q = packed_view("q", float_view(function, "q", inputs[0]));
  const TensorView k = packed_view("k", key_view(function, inputs[1], q.dtype));
  const TensorView v = packed_view("v", value_view(function, inputs[2], q.dtype, k.dtype));
  const auto offsets = [&](std::size_t i) { return py::reinterpret_borrow<py::array>(inputs[i]); };
  const auto* queries = static_cast<const std::int64_t*>(offsets(3).data());
  const auto* keys = static_cast<const std::int64_t*>(offsets(4).data());
  const std::size_t count = static_cast<std::size_t>(offsets(3).shape(0)) - 1;
  const OwnOptions own{inputs[5], inputs[6], inputs[7], inputs[8]};

  Sequences sequences(count);
  bool meets = false;
  const TensorView given = out.is_none() ? TensorView{} : view_of(py::reinterpret_borrow<py::array>(out), q.dtype);
  for (std::size_t i = 0; i < count; ++i) {
    Sequence& s = sequences.make(i, q, k, v, queries, keys);
    AttentionArguments arguments = arguments_of(function, options, s.query.view, s.key.view, s.value.view);
    arguments.first_entry = static_cast<std::int64_t>(i);
    std::int64_t step[1];
    own.apply(arguments, i, step);
    s.problem = problem_of(arguments, i);
    meets = meets || (given && meets_any(given, arguments));
  }
  Shape shape;
  for (const std::int64_t n : {q.shape[0], q.shape[1], v.shape[2]}) shape.append(n);
  if (given) check_out(function, py::reinterpret_borrow<py::array>(out), shape, q.dtype);
  Destination result(std::move(out), given && !meets, shape, q.dtype, inputs[0]);
  const TensorView packed_out = result.view(q.dtype);
  py::object lse = py::none();
  Shape lse_shape;
  lse_shape.append(q.shape[1]);
  lse_shape.append(q.shape[0]);
  if (options.return_lse) lse = new_array(lse_shape, computed_in(q.dtype));
  py::object weights = options.return_weights ? py::object(py::list()) : py::none();
  for (std::size_t i = 0; i < count; ++i) {
    Problem& problem = sequences[i].problem;
    attach_out(problem, RowsOf(packed_out, queries[i], problem.q_len).view);
    if (!lse.is_none())
      attach_lse(problem,
                 LseOf(view_of(py::reinterpret_borrow<py::array>(lse), problem.dtype), queries[i], problem.q_len).view);
    if (!weights.is_none()) {
      const py::array array = new_array(weights_shape(problem), problem.dtype);
      attach_weights(problem, view_of(array, problem.dtype));
      weights.attr("append")(array);
    }
  }
  if (!sequences.run(active_kernels(), options.num_threads)) throw py::error_already_set();
  return join(result.deliver(), lse, weights);
}

}  // namespace

void register_varlen(py::module_& module) { module.def("attention_varlen", &attention_varlen); }

}  // namespace selfattn::bindings
