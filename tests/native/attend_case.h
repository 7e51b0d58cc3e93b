// An attention call that owns the memory of its arguments, and functions that compute it.
#pragma once
#include <vector>

#include "arrays.h"
#include "attend.h"
#include "backward.h"
#include "plan.h"
#include "problem.h"

namespace selfattn::native {

struct Case {
  Array q, k, v, mask, bias, q_offset, q_lens, kv_lens, kv_starts, alibi_slopes, sinks;
  Array r, u, w, distance_bias;
  AttentionArguments options;  // everything but the arrays
  bool lse = false, weights = false;
  Layout out;

  AttentionArguments arguments() const;
};

// Whether two arrays have the same shape and bits, or are both absent.
bool same_bits(const Array& a, const Array& b);

struct Results {
  Array out, lse, weights;
  bool finished = false;
  Plan plan{};
  int threads = 0;

  bool operator==(const Results& other) const;  // compares every bit of every element
};

// Allocates the outputs that the case requests, and attaches them to its problem.
Results attach_results(const Case& c, Problem& problem);

enum class Threads { as_planned, forced };

// `forced`: uses all requested threads, however small the problem.
Results compute(const Case& c, const KernelSet& kernels, int threads, Threads how = Threads::as_planned,
                Interrupted interrupted = nullptr);

// As above, with `arguments` instead of the case's own, for example with keys and values in a cache.
Results compute(const Case& c, const AttentionArguments& arguments, const KernelSet& kernels, int threads,
                Threads how = Threads::as_planned, Interrupted interrupted = nullptr);

// The gradients of L, half the sum of squares of a call's results. The gradient of L with respect to a result is the
// result itself.
struct GradientArrays {
  Array query, key, value, scores;
  Array relative;                                              // for each batch entry and head
  std::vector<double> numbers;                                 // of the scale, the slopes and the sinks, for each row
  std::vector<double> key_bias, relative_bias, distance_bias;  // for each batch entry and head
  bool finished = false;

  bool operator==(const GradientArrays& other) const;
};

enum class Wanted { everything, query, key, value };

GradientArrays differentiate(const Case& c, const KernelSet& kernels, int threads, Threads how = Threads::as_planned,
                             Interrupted interrupted = nullptr, Wanted wanted = Wanted::everything);

}  // namespace selfattn::native
