// attend_vectors ISA FILE: computes every case of the file on one instruction set, and compares the results with the
// file's.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend.h"
#include "check.h"
#include "compare.h"
#include "registry.h"
#include "streaming.h"
#include "vectors_file.h"

namespace selfattn::test {
namespace {

// The errors that a matrix unit adds (docs/numerics.md). `values` comes from rounding weights and values. `scores`
// comes from splitting queries and keys, and is multiplied by sigma.
struct Rounding {
  double values, scores;
};

Rounding rounding_of(const Plan& plan, DType dtype) {
  for (const char* exact : {"fma", "bfloat16 dots", "int8 dots"})
    if (std::strcmp(plan.attend->unit, exact) == 0) return {0, 0};
  return dtype == DType::bf16 ? Rounding{0x1p-8, 0} : Rounding{0x1p-16, 0x1p-16};
}

AttentionArguments arguments_of(const VectorCase& c) {
  AttentionArguments a;
  a.q = c.view("q");
  a.k = c.view("k");
  a.v = c.view("v");
  a.mask = c.view("mask");
  a.bias = c.view("bias");
  a.q_offset = c.view("q_offset");
  a.q_lens = c.view("q_lens");
  a.kv_lens = c.view("kv_lens");
  a.alibi_slopes = c.view("alibi_slopes");
  a.sinks = c.view("sinks");
  a.r = c.view("r");
  a.u = c.view("u");
  a.w = c.view("w");
  a.r_origin = static_cast<std::int64_t>(c.number("r_origin", 0));
  a.distance_bias = c.view("distance_bias");
  a.distance_origin = static_cast<std::int64_t>(c.number("distance_origin", 0));
  a.layout = c.number("bshd", 0) != 0 ? selfattn::Layout::bshd : selfattn::Layout::bhsd;
  a.causal = c.number("causal", 0) != 0;
  a.window_left = static_cast<std::int64_t>(c.number("window_left", -1));
  a.window_right = static_cast<std::int64_t>(c.number("window_right", -1));
  if (c.numbers.count("scale") != 0) a.scale = c.number("scale", 0);
  if (const double softcap = c.number("softcap", 0); softcap != 0) a.softcap = softcap;
  a.dropout = c.number("dropout", 0);
  a.seed = static_cast<std::uint64_t>(c.number("seed", 0));
  return a;
}

Array array_of(DType dtype, const Shape& shape) {
  return {dtype, std::vector<std::int64_t>(shape.extent, shape.extent + shape.ndim)};
}

struct Results {
  Array out, lse, weights;
  const char* kernel;
  Rounding rounding;
};

Results compute(const VectorCase& c, const KernelSet& kernels, int threads, bool with_weights) {
  Problem problem = make_problem(arguments_of(c));
  Results results{array_of(c.array("q").dtype(), out_shape(problem)),
                  array_of(problem.dtype, lse_shape(problem)),
                  array_of(problem.dtype, weights_shape(problem)),
                  nullptr,
                  {}};
  attach_out(problem, results.out.view());
  attach_lse(problem, results.lse.view());
  if (with_weights) attach_weights(problem, results.weights.view());
  const Plan plan = make_plan(problem, kernels);
  results.kernel = plan.attend->name;
  results.rounding = rounding_of(plan, c.array("q").dtype());
  if (!attend(problem, plan, threads_for(plan, threads), nullptr)) throw std::runtime_error("interrupted");
  return results;
}

// A piece of an operand: some of its keys. `axis` is the axis of the keys, counted from the end.
class PieceOf {
 public:
  PieceOf(const TensorView& whole, int axis, std::int64_t first, std::int64_t count) : view_(whole) {
    if (!whole || whole.ndim <= axis || whole.extent(axis) == 1) return;
    extents_.assign(whole.shape, whole.shape + whole.ndim);
    extents_[static_cast<std::size_t>(whole.ndim - 1 - axis)] = count;
    view_.shape = extents_.data();
    view_.data = static_cast<char*>(whole.data) + first * whole.stride(axis);
  }
  PieceOf(const PieceOf&) = delete;
  PieceOf& operator=(const PieceOf&) = delete;
  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  std::vector<std::int64_t> extents_;
};

// States do not have the operands of relative attention, and queries have all axes of the result.
bool can_stream(const AttentionArguments& a, const Problem& problem) {
  const Shape rows = rows_shape(problem, problem.num_heads, problem.q_len, problem.head_dim);
  return !a.r && problem.kv_len > 1 && a.q.ndim == rows.ndim &&
         std::equal(a.q.shape, a.q.shape + a.q.ndim, rows.extent);
}

// Absorbs the keys in three pieces.
Results stream(const VectorCase& c, const KernelSet& kernels) {
  const AttentionArguments whole = arguments_of(c);
  const std::int64_t kv_len = make_problem(whole).kv_len;
  const int axis = whole.layout == selfattn::Layout::bshd && whole.k.ndim > 2 ? 2 : 1;
  AttentionState state(kv_len, 0);
  const std::int64_t cuts[] = {0, kv_len / 3, kv_len / 3 + 1, kv_len};
  for (int i = 0; i < 3; ++i) {
    const std::int64_t first = cuts[i], count = cuts[i + 1] - first;
    const PieceOf k(whole.k, axis, first, count), v(whole.v, axis, first, count);
    const PieceOf mask(whole.mask, 0, first, count), bias(whole.bias, 0, first, count);
    AttentionArguments piece = whole;
    piece.k = k.view();
    piece.v = v.view();
    piece.mask = mask.view();
    piece.bias = bias.view();
    const Problem problem = state.problem_of(piece, first);
    if (!state.absorb(problem, make_plan(problem, kernels), 1 + i, nullptr)) throw std::runtime_error("interrupted");
  }
  Problem problem = state.results("result");
  Results results{array_of(c.array("q").dtype(), out_shape(problem)),
                  array_of(problem.dtype, lse_shape(problem)),
                  Array(problem.dtype, {0}),
                  nullptr,
                  {}};
  attach_out(problem, results.out.view());
  attach_lse(problem, results.lse.view());
  if (!state.finish(problem, kernels, 2, nullptr)) throw std::runtime_error("interrupted");
  return results;
}

// The larger error of the results in pieces, as a share of its bound.
double streamed_error(const VectorCase& c, const KernelSet& kernels, double sigma, const Rounding& rounding) {
  if (!can_stream(arguments_of(c), make_problem(arguments_of(c)))) return 0;
  const Results found = stream(c, kernels);
  return std::max(
      compare_out(found.out, c.array("out"), c.array("magnitude"), sigma, rounding.values + sigma * rounding.scores),
      compare_lse(found.lse, c.array("lse"), sigma, rounding.scores));
}

// Prints one line for the case. Returns whether it passed.
bool run(const VectorCase& c, const KernelSet& kernels) {
  begin_section(c.name.c_str());
  const Results fused = compute(c, kernels, 1, false), whole = compute(c, kernels, 3, true);
  const double sigma = c.numbers.at("sigma");
  const Rounding rounding = fused.rounding;
  const double out =
      compare_out(fused.out, c.array("out"), c.array("magnitude"), sigma, rounding.values + sigma * rounding.scores);
  const double lse = compare_lse(fused.lse, c.array("lse"), sigma, rounding.scores);
  const double pieces = streamed_error(c, kernels, sigma, rounding);
  const double weights = compare_weights(whole.weights, c.array("weights"), sigma, rounding.scores);
  // A result depends neither on the number of threads nor on whether weights are returned.
  const bool same = same_bits(fused.out, whole.out) && same_bits(fused.lse, whole.lse);
  const bool passed = out <= 1 && lse <= 1 && weights <= 1 && pieces <= 1 && same;
  std::printf("%s %-32s %-4s kernel, of the bounds: out %.2f, lse %.2f, weights %.2f, in pieces %.2f%s\n",
              passed ? "ok  " : "FAIL", c.name.c_str(), fused.kernel, out, lse, weights, pieces,
              same ? "" : "; results differ with threads and weights");
  return passed;
}

int run_all(const char* isa, const char* path) {
  const auto& available = available_kernels();
  const auto found = std::find_if(available.begin(), available.end(),
                                  [isa](const KernelSet* kernels) { return std::strcmp(kernels->name, isa) == 0; });
  if (found == available.end()) {
    std::printf("skipped: this machine has no %s\n", isa);
    return skipped;
  }
  const std::vector<VectorCase> cases = read_vectors(path);
  const auto failed = std::count_if(cases.begin(), cases.end(), [&](const VectorCase& c) { return !run(c, **found); });
  std::printf("%s: %zu cases, %td failed\n", isa, cases.size(), failed);
  return failed == 0 && !cases.empty() ? 0 : 1;
}

}  // namespace
}  // namespace selfattn::test

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: attend_vectors ISA FILE\n");
    return 2;
  }
  selfattn::test::report_faults();
  try {
    return selfattn::test::run_all(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attend_vectors: %s\n", error.what());
    return 1;
  }
}
