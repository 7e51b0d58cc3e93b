// attention_varlen(): sequences of different lengths in one call, each computed as if it were alone.
#include "bindings/varlen.h"

#include <string>
#include <utility>

#include "attend.h"
#include "bindings/attention.h"
#include "message.h"
#include "registry.h"

namespace selfattn::bindings {
namespace {

TensorView packed_view(const char* function, const char* name, const TensorView& view) {
  if (view.ndim != 3)
    refuse(function, Argument{name}, " has shape ", shape_text(view),
           " but needs 3 dimensions (total, heads, head_dim)");
  return view;
}

const std::int64_t* integers_of(py::handle array) {
  return static_cast<const std::int64_t*>(py::reinterpret_borrow<py::array>(array).data());
}

// The number that belongs to a sequence; absent if there is no array.
TensorView number_of(py::handle array, std::size_t i) {
  if (array.is_none()) return {};
  const TensorView all = optional_view(array, DType::i64);
  return {static_cast<char*>(all.data) + static_cast<std::int64_t>(i) * all.stride(0), DType::i64, 0, nullptr, nullptr};
}

// Like make_problem, but error messages name the sequence as well.
Problem problem_of(const AttentionArguments& arguments, std::size_t i) {
  try {
    return make_problem(arguments);
  } catch (const Refusal& refusal) {
    Message message = refusal.message();
    extend(message, " (sequence " + std::to_string(i) + ")");
    throw Refusal(std::move(message));
  }
}

}  // namespace

Packed::Packed(const char* function, const VarlenInputs& inputs)
    : q(packed_view(function, "q", float_view(function, "q", inputs.q))),
      k(packed_view(function, "k", key_view(function, inputs.k, q.dtype))),
      v(packed_view(function, "v", value_view(function, inputs.v, q.dtype, k.dtype))),
      queries(integers_of(inputs.cu_seqlens_q)),
      keys(integers_of(inputs.cu_seqlens_k)),
      count(py::len(inputs.cu_seqlens_q) - 1),
      function_(function),
      inputs_(inputs) {}

Shape Packed::lse_shape() const {
  Shape shape;
  shape.append(q.shape[1]);
  shape.append(q.shape[0]);
  return shape;
}

AttentionArguments Packed::arguments(const Options& options, std::size_t i, Sequence& sequence) const {
  AttentionArguments own =
      arguments_of(function_, options, sequence.query.view, sequence.key.view, sequence.value.view);
  own.first_entry = static_cast<std::int64_t>(i);
  if (!inputs_.mask.is_none()) own.mask = bool_view(function_, "mask", inputs_.mask[py::int_(i)]);
  if (!inputs_.bias.is_none()) {
    const py::object bias = inputs_.bias[py::int_(i)];
    if (!bias.is_none()) own.bias = float_view(function_, "bias", bias);
  }
  own.q_offset = number_of(inputs_.q_offset, i);
  own.kv_starts = number_of(inputs_.kv_starts, i);
  own.prefix_lens = number_of(inputs_.prefix_lens, i);
  if (!inputs_.alibi_slopes.is_none()) {
    const TensorView all = optional_view(inputs_.alibi_slopes, DType::f64);
    sequence.slope_stride = all.stride(0);
    own.alibi_slopes = {static_cast<char*>(all.data) + static_cast<std::int64_t>(i) * all.stride(1), DType::f64, 1,
                        all.shape + 1, &sequence.slope_stride};
  }
  return own;
}

Sequence::Sequence(const Packed& packed, const Options& options, std::size_t i)
    : query(packed.q, packed.queries[i], packed.queries_of(i)),
      key(packed.k, packed.keys[i], packed.keys_of(i)),
      value(packed.v, packed.keys[i], packed.keys_of(i)),
      arguments(packed.arguments(options, i, *this)),
      problem(problem_of(arguments, i)) {}

namespace {

bool run(PerSequence<Sequence>& sequences, std::size_t number, int num_threads) {
  const KernelSet& kernels = active_kernels();
  PerSequence<Plan> plans(number);
  PerSequence<Job> jobs(number);
  double flops = 0;
  for (std::size_t i = 0; i < number; ++i) {
    const Problem& problem = sequences[i].problem;
    const Plan& plan = plans.make(i, make_plan(problem, kernels));
    jobs.make(i, &problem, &plan);
    flops += plan.flops;
  }
  const auto count = static_cast<std::int64_t>(number);
  const int threads = threads_for(jobs.data(), count, num_threads);
  const CoreCall call_of_core(flops);
  return attend(jobs.data(), count, threads, interrupted);
}

py::object attention_varlen(const char* function, py::handle operands, py::object out, py::handle option_values) {
  const VarlenInputs& inputs = Record<VarlenInputs>::in(operands);
  const Options& options = options_of(option_values);
  const Packed packed(function, inputs);
  const DType computed = computed_in(packed.q.dtype), dtype = options.exact ? computed : packed.q.dtype;
  PerSequence<Sequence> sequences(packed.count);
  bool meets = false;
  const TensorView given = out.is_none() ? TensorView{} : view_of(py::reinterpret_borrow<py::array>(out), dtype);
  for (std::size_t i = 0; i < packed.count; ++i) {
    const Sequence& sequence = sequences.make(i, packed, options, i);
    meets = meets || (given && meets_any(given, sequence.arguments));
  }
  Shape shape;
  for (const std::int64_t n : {packed.q.shape[0], packed.q.shape[1], packed.v.shape[2]}) shape.append(n);
  if (given) check_out(function, py::reinterpret_borrow<py::array>(out), shape, dtype);
  Destination result(std::move(out), given && !meets, shape, dtype, inputs.q);
  const TensorView packed_out = result.view(dtype);
  const DType lse_type = options.exact ? DType::f64 : computed;
  py::object lse = py::none();
  if (options.return_lse) lse = new_array(packed.lse_shape(), lse_type);
  py::object weights = options.return_weights ? py::object(py::list()) : py::none();
  for (std::size_t i = 0; i < packed.count; ++i) {
    Problem& problem = sequences[i].problem;
    attach_out(problem, RowsOf(packed_out, packed.queries[i], problem.q_len).view);
    if (!lse.is_none()) {
      const TensorView all = view_of(py::reinterpret_borrow<py::array>(lse), lse_type);
      attach_lse(problem, LseOf(all, packed.queries[i], problem.q_len).view);
    }
    if (!weights.is_none()) {
      const py::array array = new_array(weights_shape(problem), problem.dtype);
      attach_weights(problem, view_of(array, problem.dtype));
      weights.attr("append")(array);
    }
  }
  if (!run(sequences, packed.count, options.num_threads)) throw py::error_already_set();
  return join(result.deliver(), lse, weights);
}

}  // namespace

void register_varlen(py::module_& module) { module.def("attention_varlen", &attention_varlen); }

}  // namespace selfattn::bindings
