// Handlers for XLA: attention and its gradients on the arrays of a compiled JAX program (decision 8). XLA calls the
// handlers on its own threads without the GIL. The handlers do not use Python, and cannot be interrupted.
#include <cstring>
#include <optional>
#include <vector>

#include "attend.h"
#include "backward.h"
#include "bindings/attention.h"
#include "bindings/xla_call.h"
#include "registry.h"

namespace selfattn::bindings {
namespace {

using xla::Array;
using xla::Call;
using xla::Doubles;
using xla::Lengths;

// The bits of the attributes `given` and `wrt`.
constexpr std::int64_t bias_given = 1, mask_given = 2, query_lengths_given = 4, key_lengths_given = 8;
constexpr std::int64_t query_wanted = 1, key_wanted = 2, value_wanted = 4, bias_wanted = 8;

// The operands of attention, as views that `arguments` refers to. Query, key and value are XLA's arguments from `first`
// on; the operands that may be absent start at XLA's argument `rest`.
class Operands {
 public:
  Operands(const Call& call, std::int64_t first, std::int64_t rest)
      : query_(call.argument(first)), key_(call.argument(first + 1)), value_(call.argument(first + 2)) {
    const Shape batch = call.batch(query_.view.ndim - 3);
    query_.repeat(batch.extent, batch.ndim);
    arguments.function = xla::function;
    arguments.layout = Layout::bshd;
    arguments.causal = call.attribute<std::int64_t>("causal") != 0;
    arguments.window_left = call.attribute<std::int64_t>("left");
    arguments.window_right = call.attribute<std::int64_t>("right");
    arguments.scale = call.attribute<double>("scale");
    arguments.q = query_.view;
    arguments.k = key_.view;
    arguments.v = value_.view;
    arguments.q_offset = {&first_query_, DType::i64, 0, nullptr, nullptr};
    if (call.is_set("given", bias_given)) arguments.bias = bias_.emplace(call.argument(rest++)).view;
    if (call.is_set("given", mask_given)) arguments.mask = mask_.emplace(call.argument(rest++)).view;
    if (call.is_set("given", query_lengths_given))
      arguments.q_lens = query_lengths_.emplace(call.argument(rest++)).array.view;
    if (call.is_set("given", key_lengths_given))
      arguments.kv_lens = key_lengths_.emplace(call.argument(rest++)).array.view;
  }
  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;

  AttentionArguments arguments;

 private:
  std::int64_t first_query_ = 0;  // JAX counts positions of queries and keys from 0
  Array query_, key_, value_;
  std::optional<Array> bias_, mask_;
  std::optional<Lengths> query_lengths_, key_lengths_;
};

// Results: out, in query's type or the type of computation; optionally the log-sum-exps.
void attend_xla(const Call& call) {
  const Operands operands(call, 0, 3);
  Problem problem = xla::problem_of(operands.arguments);
  attach_out(problem, Array(call.result(0)).view);
  if (call.results() > 1) attach_lse(problem, Doubles(call.result(1)).view);
  const Plan plan = make_plan(problem, active_kernels());
  attend(problem, plan, threads_for(plan, 0), nullptr);
}

// The gradient of the bias, in the shape of the bias.
class BiasGradient {
 public:
  BiasGradient(Problem& problem, const xla::Buffer& buffer)
      : problem_(problem),
        array_(buffer),
        target_(place_scores(problem, array_.view)),
        one_key_(target_.column == 0 && problem.kv_len != 1),
        one_query_(target_.row == 0 && problem.q_len != 1) {
    for (int axis = 0; axis < array_.view.ndim; ++axis) size_ *= array_.view.shape[axis];
    std::memset(array_.view.data, 0, static_cast<std::size_t>(size_ * size_of(array_.view.dtype)));
  }

  void attach(Gradients& gradients) {
    const std::int64_t heads = problem_.batch * problem_.num_heads;
    if (one_key_) {
      sums_.resize(static_cast<std::size_t>(heads * problem_.q_len));
      gradients.row_sums = sums_.data();
    } else if (one_query_) {
      sums_.resize(
          static_cast<std::size_t>(heads * problem_.kv_len));  // room for doubles, even if the core writes floats
      gradients.key_sums = reinterpret_cast<char*>(sums_.data());
    } else {
      gradients.scores = target_;
      gradients.shares_scores = size_ != heads * problem_.q_len * problem_.kv_len;
    }
  }

  // If the core has summed over keys or queries, sums its results over the other axes along which the bias is
  // broadcast, and writes these sums to the gradient.
  void finish() {
    if (one_key_) return add(sums_.data(), problem_.q_len, target_.row);
    if (!one_query_) return;
    if (problem_.dtype == DType::f64) return add(sums_.data(), problem_.kv_len, target_.column);
    add(reinterpret_cast<const float*>(sums_.data()), problem_.kv_len, target_.column);
  }

 private:
  template <class T>
  void add(const T* from, std::int64_t length, std::int64_t stride) {
    std::vector<double> totals(static_cast<std::size_t>(size_));
    char* start = static_cast<char*>(array_.view.data);
    const std::int64_t element = size_of(array_.view.dtype);
    for (std::int64_t b = 0; b < problem_.batch; ++b)
      for (std::int64_t h = 0; h < problem_.num_heads; ++h) {
        const std::int64_t first = problem_.at(target_, b) - start + h * target_.head;
        for (std::int64_t i = 0; i < length; ++i)
          totals[static_cast<std::size_t>((first + i * stride) / element)] += *from++;
      }
    for (std::int64_t i = 0; i < size_; ++i) write(i, totals[static_cast<std::size_t>(i)]);
  }

  void write(std::int64_t i, double value) {
    if (array_.view.dtype == DType::f64)
      static_cast<double*>(array_.view.data)[i] = value;
    else
      static_cast<float*>(array_.view.data)[i] = static_cast<float>(value);
  }

  const Problem& problem_;
  Array array_;
  Operand target_;
  const bool one_key_, one_query_;
  std::int64_t size_ = 1;
  std::vector<double> sums_;
};

// Arguments: grad_out; query, key, value; out; the log-sum-exps; then the operands that may be absent. Results: the
// gradients that `wrt` names. The gradient of the bias has the type of computation.
void differentiate_xla(const Call& call) {
  const Operands operands(call, 1, 6);
  Problem problem = xla::problem_of(operands.arguments);
  attach_out(problem, Array(call.argument(4)).view);
  attach_lse(problem, Doubles(call.argument(5)).view);
  Gradients gradients;
  gradients.dout = place_rows(problem, Array(call.argument(0)).view);
  std::int64_t next = 0;
  const auto rows = [&] { return place_rows(problem, Array(call.result(next++)).view); };
  if (call.is_set("wrt", query_wanted)) gradients.query = rows();
  if (call.is_set("wrt", key_wanted)) gradients.key = rows();
  if (call.is_set("wrt", value_wanted)) gradients.value = rows();
  std::optional<BiasGradient> bias;
  if (call.is_set("wrt", bias_wanted)) bias.emplace(problem, call.result(next)).attach(gradients);
  const BackwardPlan plan = make_backward_plan(problem, gradients, active_kernels());
  attend_backward(problem, gradients, plan, threads_for(plan, 0), nullptr);
  if (bias) bias->finish();
}

xla::Error* fail(const xla::Api& api, xla::ErrorCode code, const char* message) {
  xla::ErrorRequest request{sizeof request, nullptr, message, code};
  return api.create_error(&request);
}

void answer(xla::Metadata& metadata) {
  metadata.version.major_number = xla::api_major;
  metadata.version.minor_number = xla::api_minor;
  metadata.traits = 0;
}

// No exception may leave a handler.
template <void compute(const Call&)>
xla::Error* handle(xla::CallFrame* frame) noexcept {
  if (frame->extensions && frame->extensions->kind == xla::metadata_kind) {
    answer(*reinterpret_cast<xla::MetadataExtension*>(frame->extensions)->metadata);
    return nullptr;
  }
  try {
    compute(Call(*frame));
    note_end_of_call();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return fail(*frame->api, xla::ErrorCode::invalid_argument, error.what());
  } catch (const std::bad_alloc&) {
    return fail(*frame->api, xla::ErrorCode::resource_exhausted, "dot_product_attention: not enough memory");
  } catch (const std::exception& error) {
    return fail(*frame->api, xla::ErrorCode::internal, error.what());
  }
}

template <void compute(const Call&)>
py::capsule capsule() {
  return py::capsule(reinterpret_cast<void*>(&handle<compute>), static_cast<const char*>(nullptr));
}

}  // namespace

void register_xla(py::module_& module) {
  using py::literals::operator""_a;
  // By the names of JAX's operands, in the order of a handler's arguments and results.
  module.attr("XLA_GIVEN") = py::dict("bias"_a = bias_given, "mask"_a = mask_given,
                                      "query_lengths"_a = query_lengths_given, "key_lengths"_a = key_lengths_given);
  module.attr("XLA_WANTED") =
      py::dict("query"_a = query_wanted, "key"_a = key_wanted, "value"_a = value_wanted, "bias"_a = bias_wanted);
  module.attr("xla_attention") = capsule<&attend_xla>();
  module.attr("xla_attention_backward") = capsule<&differentiate_xla>();
}

}  // namespace selfattn::bindings
