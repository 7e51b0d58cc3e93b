// libFuzzer's target. Any bytes describe an attention call. The call must be refused with a message, or give the
// correct result, which must be the same on one thread and on several. It must not access memory out of bounds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "definition.h"
#include "fuzz_case.h"

namespace selfattn::native {
namespace {

constexpr double effort = 10000;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FOUND: %s\n", what.c_str());
  std::abort();
}

// Returns whether the call is accepted.
bool accepted(const Described& d) {
  try {
    make_problem(d.input.arguments());
    return true;
  } catch (const std::invalid_argument& refusal) {
    const std::string message = refusal.what();
    if (message.rfind("attention: ", 0) != 0 || message.size() < 20) fail("message without content: " + message);
    if (d.valid) fail("refuses a valid call: " + message);
    return false;
  }
}

void plan_only(const Described& d) {
  const Plan plan = make_plan(make_problem(d.input.arguments()), *d.kernels);
  const int one = threads_for(plan, 1), several = threads_for(plan, d.threads);
  if (one != 1 || several < 1 || several > d.threads) fail("the number of threads for a plan");
}

// Whether results have the bounds that `judge` checks. They do not if a unit rounds operands or weights.
bool exact(const Plan& plan) {
  for (const char* unit : {"fma", "bfloat16 dots", "int8 dots"})
    if (std::strcmp(plan.attend->unit, unit) == 0) return true;
  return false;
}

// Whether a cache of these keys fits in memory: each run of keys takes at least a page.
bool few_enough(const Case& c) { return c.k.count() + c.v.count() <= 20000; }

// Checks that gaps between the elements of `out` still have their initial value.
void check_gaps(const Array& out) {
  out.each([&](char* p) { std::memset(p, 0xff, static_cast<std::size_t>(size_of(out.dtype()))); });
  for (const char byte : out.bytes())
    if (byte != '\xff') fail("bytes between the elements of out were written");
}

// If keys are in pages or a ring, the result is bit-identical to `plain`. With codes, it is bit-identical to the result
// for codes in one array, and correct for the numbers that the codes represent.
void check_cached(Described& d, const Results& plain) {
  const CachedCase cached(d.input, d.store);
  const Results stored = compute(d.input, cached.arguments(), *d.kernels, d.threads, Threads::forced);
  if (!d.store.codes) {
    if (!(stored == plain)) fail("results differ if a cache holds the keys");
    return;
  }
  const CachedCase in_order(d.input, {.codes = d.store.codes});
  if (!(stored == compute(d.input, in_order.arguments(), *d.kernels, 1, Threads::forced)))
    fail("results differ if a cache holds codes");
  d.input.k = coded(d.input.k, *d.store.codes);
  d.input.v = coded(d.input.v, *d.store.codes);
  if (const std::string wrong = judge(d.input, stored, effort); !wrong.empty()) fail("of codes: " + wrong);
}

// Whether the numbers have the same bits. Every NaN is equal to every other NaN: with other gradients, other
// instructions compute the scores' gradients, and the sign of a NaN depends on the order of their operands.
bool same_numbers(const Array& a, const Array& b) {
  if (!a || !b || a.count() != b.count()) return !a && !b;
  for (std::int64_t i = 0; i < a.count(); ++i) {
    const double x = a.number(i), y = b.number(i);
    if (std::memcmp(&x, &y, sizeof x) != 0 && !(std::isnan(x) && std::isnan(y))) return false;
  }
  return true;
}

void check_gradients(const Described& d) {
  const GradientArrays one = differentiate(d.input, *d.kernels, 1, Threads::forced);
  const GradientArrays several = differentiate(d.input, *d.kernels, d.threads, Threads::forced);
  if (!one.finished || !several.finished) fail("gradients did not finish, although nothing interrupted them");
  if (!(one == several)) fail("gradients with other bits on " + std::to_string(d.threads) + " threads");
  const auto alone = [&](Wanted wanted) {
    return differentiate(d.input, *d.kernels, 1, Threads::forced, nullptr, wanted);
  };
  if (!same_numbers(alone(Wanted::query).query, one.query) || !same_numbers(alone(Wanted::key).key, one.key) ||
      !same_numbers(alone(Wanted::value).value, one.value))
    fail("a gradient alone has other bits than together with all others");
}

void compute_and_check(Described& d) {
  const Results one = compute(d.input, *d.kernels, 1, Threads::forced);
  const Results several = compute(d.input, *d.kernels, d.threads, Threads::forced);
  if (!one.finished || !several.finished) fail("an uninterrupted call did not finish");
  if (!(one == several)) fail("results differ on " + std::to_string(d.threads) + " threads");
  if (d.well_behaved && exact(one.plan))
    if (const std::string wrong = judge(d.input, one, effort); !wrong.empty()) fail(wrong);
  check_gaps(several.out);
  if (!d.input.options.recent_mask) check_gradients(d);  // calls on caches have no gradients
  if (d.cached && cacheable(d.input) && few_enough(d.input) && (!d.store.codes || d.well_behaved)) check_cached(d, one);
}

}  // namespace
}  // namespace selfattn::native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace selfattn::native;
  Described d = describe(data, size);
  if (!d.input.q) return -1;  // nothing that NumPy could express: not worth keeping
  if (!accepted(d)) return 0;
  if (d.computable)
    compute_and_check(d);
  else
    plan_only(d);
  return 0;
}
