// attention_varlen_backward(): the gradients of attention_varlen. Each sequence is computed as if it were alone.
#include <string>

#include "backward.h"
#include "bindings/attention.h"
#include "bindings/gradients.h"
#include "bindings/varlen.h"
#include "registry.h"

namespace selfattn::bindings {
namespace {

Shape packed_shape(const TensorView& like, std::int64_t last) {
  Shape shape;
  for (const std::int64_t n : {like.shape[0], like.shape[1], last}) shape.append(n);
  return shape;
}

// The results of all sequences: packed arrays for q, k and v, lists for the others.
class PackedResults {
 public:
  PackedResults(const Packed& packed, const VarlenInputs& inputs, const py::sequence& wrt, bool exact)
      : packed_(packed), wrt_(wrt), exact_(exact) {
    query_ = array_for("q", packed.q, inputs.q);
    key_ = array_for("k", packed.k, inputs.k);
    value_ = array_for("v", packed.v, inputs.v);
    for (const char* name : {"bias", "scale", "alibi_slopes", "sinks", "t5"})
      if (wants(name)) arrays[name] = py::list();
  }

  py::dict arrays;

  Gradients of(std::size_t i, Sequence& sequence) {
    Problem& problem = sequence.problem;
    Gradients gradients;
    const auto place = [&](Operand& operand, const TensorView& array, std::int64_t first, std::int64_t count) {
      if (array) operand = place_rows(problem, RowsOf(array, first, count).view);
    };
    place(gradients.query, query_, packed_.queries[i], problem.q_len);
    place(gradients.key, key_, packed_.keys[i], problem.kv_len);
    place(gradients.value, value_, packed_.keys[i], problem.kv_len);
    if (wants("bias")) {
      const TensorView& bias = sequence.arguments.bias;
      append("bias", bias ? py::object(bias_gradient(problem, bias, gradients)) : py::none());
    }
    const Shape rows = selfattn::lse_shape(problem);
    gradients.scale = doubles_for("scale", rows);
    gradients.slopes = doubles_for("alibi_slopes", rows);
    gradients.sinks = doubles_for("sinks", rows);
    Shape distances = rows;
    distances.extent[distances.ndim - 1] = problem.distance_bias.count;
    gradients.distance_bias = doubles_for("t5", distances);
    return gradients;
  }

 private:
  bool wants(const char* name) const { return wrt_.contains(name); }

  TensorView array_for(const char* name, const TensorView& operand, py::handle like) {
    if (!wants(name)) return {};
    const DType dtype = exact_ ? computed_in(packed_.q.dtype) : operand.dtype;
    const py::array array = new_array(packed_shape(operand, operand.shape[2]), dtype, like);
    arrays[name] = array;
    return view_of(array, dtype);
  }

  void append(const char* name, const py::object& array) { arrays[name].attr("append")(array); }

  double* doubles_for(const char* name, const Shape& shape) {
    if (!wants(name)) return nullptr;
    const py::array array = zeros(shape, DType::f64);
    append(name, array);
    return static_cast<double*>(const_cast<void*>(array.data()));
  }

  const Packed& packed_;
  const py::sequence& wrt_;
  const bool exact_;
  TensorView query_, key_, value_;
};

bool run(PerSequence<Sequence>& sequences, PerSequence<Gradients>& gradients, std::size_t number, int num_threads) {
  const KernelSet& kernels = active_kernels();
  PerSequence<BackwardPlan> plans(number);
  PerSequence<BackwardJob> jobs(number);
  double flops = 0;
  for (std::size_t i = 0; i < number; ++i) {
    const Problem& problem = sequences[i].problem;
    const BackwardPlan& plan = plans.make(i, make_backward_plan(problem, gradients[i], kernels));
    jobs.make(i, &problem, &gradients[i], &plan);
    flops += plan.flops;
  }
  const auto count = static_cast<std::int64_t>(number);
  const int threads = threads_for(jobs.data(), count, num_threads);
  const CoreCall call_of_core(flops);
  return attend_backward(jobs.data(), count, threads, interrupted);
}

// Returns the gradients by name. The gradients of q, k and v are packed arrays. The gradients of bias, scale,
// alibi_slopes, sinks and t5 are lists with what attention_backward would return for each sequence.
py::dict attention_varlen_backward(const char* function, py::handle operands, py::handle upstream,
                                   const py::sequence& wrt, py::handle option_values) {
  const VarlenInputs& inputs = Record<VarlenInputs>::in(operands);
  const GradientInputs& given = Record<GradientInputs>::in(upstream);
  const Options& options = options_of(option_values);
  const Packed packed(function, inputs);
  PerSequence<Sequence> sequences(packed.count);
  for (std::size_t i = 0; i < packed.count; ++i) sequences.make(i, packed, options, i);
  const Shape shape = packed_shape(packed.q, packed.v.shape[2]), rows = packed.lse_shape();
  const TensorView dout = result_view(function, "grad_out", given.grad_out, shape, packed.q.dtype);
  const TensorView out = result_view(function, "out", given.out, shape, packed.q.dtype);
  const TensorView lse = lse_view(function, given.lse, rows);
  const TensorView dlse =
      given.grad_lse.is_none() ? TensorView{} : shaped_view(function, "grad_lse", given.grad_lse, rows);
  PackedResults found(packed, inputs, wrt, options.exact);
  PerSequence<Gradients> gradients(packed.count);
  for (std::size_t i = 0; i < packed.count; ++i) {
    Problem& problem = sequences[i].problem;
    const std::int64_t first = packed.queries[i], count = problem.q_len;
    attach_out(problem, RowsOf(out, first, count).view);
    attach_lse(problem, LseOf(lse, first, count).view);
    Gradients& own = gradients.make(i, found.of(i, sequences[i]));
    own.dout = place_rows(problem, RowsOf(dout, first, count).view);
    if (dlse) own.dlse = place_per_row(problem, LseOf(dlse, first, count).view);
  }
  if (!run(sequences, gradients, packed.count, options.num_threads)) throw py::error_already_set();
  return std::move(found.arrays);
}

}  // namespace

void register_varlen_backward(py::module_& module) {
  module.def("attention_varlen_backward", &attention_varlen_backward);
}

}  // namespace selfattn::bindings
