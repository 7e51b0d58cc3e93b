// cached_checks ISA: keys and values in pages, in rings and as codes give the same results as in contiguous arrays.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "cached_case.h"
#include "check.h"
#include "definition.h"
#include "registry.h"

namespace selfattn::native {
namespace {

constexpr double effort = 2e5;

struct Form {
  DType dtype;
  std::int64_t q_len;
  bool starts, mask;
};

Array numbers(DType dtype, Extents shape, std::uint64_t seed) {
  Array array(dtype, std::move(shape));
  Random random(seed);
  array.each([&](char* p) { store(p, dtype, random.real() * 1.5); });
  return array;
}

Array integers(const Extents& values) {
  Array array(DType::i64, {static_cast<std::int64_t>(values.size())});
  for (std::size_t i = 0; i < values.size(); ++i)
    std::memcpy(array.at(static_cast<std::int64_t>(i)), &values[i], sizeof values[i]);
  return array;
}

// Sequences with one block of keys, with several blocks, with enough keys to be split into ranges, and without keys.
Case make(const Form& form) {
  constexpr std::int64_t longest = 2200;
  Case c;
  c.q = numbers(form.dtype, {4, 4, form.q_len, 19}, 1);
  c.k = numbers(form.dtype, {4, 2, longest, 19}, 2);
  c.v = numbers(form.dtype, {4, 2, longest, 13}, 3);
  c.kv_lens = integers({longest - 1, 37, 0, 700});
  c.options.cached = true;  // aligns queries with the end of the keys, even if there are fewer keys
  c.lse = true;
  if (form.starts) c.kv_starts = integers({longest - 300, 5, 0, 641});
  if (form.mask) {
    c.options.recent_mask = true;
    c.mask = Array(DType::boolean, {4, 1, form.q_len, form.q_len});
    Random random(4);
    c.mask.each([&](char* p) { store(p, DType::boolean, random.below(3) != 0); });
  } else {
    c.options.causal = true;
  }
  return c;
}

std::string text_of(const Form& form, const KernelSet& kernels, const char* where) {
  return std::string(kernels.name) + " " + name_of(form.dtype) + ", " + std::to_string(form.q_len) + " queries" +
         (form.starts ? ", starts" : "") + (form.mask ? ", mask" : "") + ", " + where;
}

class Checks {
 public:
  Checks(const Form& form, const KernelSet& kernels) : form_(form), kernels_(kernels), case_(make(form)) {}

  void run() {
    begin("one array");
    const Results plain = native::compute(case_, kernels_, 1);
    if (form_.q_len == 1) SELFATTN_CHECK(plain.plan.attend->by_row);
    if (form_.q_len >= 40) SELFATTN_CHECK(!plain.plan.attend->by_row);
    if (form_.q_len < 10) SELFATTN_CHECK(plain.plan.ranges > 1);
    if (std::strcmp(plain.plan.attend->unit, "fma") == 0) expect_right(case_, plain);
    compare(plain, std::nullopt);
    for (const DType codes : {DType::i8, DType::i4}) {
      begin(name_of(codes));
      const CachedCase held(case_, {.codes = codes});
      const Results of_codes = native::compute(case_, held.arguments(), kernels_, 1);
      Case exact = make(form_);
      exact.k = coded(case_.k, codes);
      exact.v = coded(case_.v, codes);
      expect_right(exact, of_codes);
      compare(of_codes, codes);
    }
  }

 private:
  void begin(const char* where) {
    section_ = text_of(form_, kernels_, where);
    test::begin_section(section_.c_str());
  }

  static void expect_right(const Case& c, const Results& results) {
    const std::string wrong = judge(c, results, effort);
    if (!wrong.empty()) std::printf("%s\n", wrong.c_str());
    SELFATTN_CHECK(wrong.empty());
  }

  // Compares all bits, on one thread and on several.
  void compare(const Results& expected, std::optional<DType> codes) {
    const std::string of = codes ? std::string(" of ") + name_of(*codes) : "";
    for (const std::int64_t page_size : {1, 3, 16}) {
      begin(("pages of " + std::to_string(page_size) + of).c_str());
      compare(expected, {.page_size = page_size, .codes = codes, .seed = static_cast<std::uint64_t>(page_size)});
    }
    begin(("a ring" + of).c_str());
    compare(expected, {.ring = true, .codes = codes});
  }

  void compare(const Results& expected, const Store& store) {
    const CachedCase cached(case_, store);
    SELFATTN_CHECK(native::compute(case_, cached.arguments(), kernels_, 1) == expected);
    SELFATTN_CHECK(native::compute(case_, cached.arguments(), kernels_, 3, Threads::forced) == expected);
  }

  const Form form_;
  const KernelSet& kernels_;
  const Case case_;
  std::string section_;
};

void check_all(const KernelSet& kernels) {
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16})
    for (const std::int64_t q_len : {1, 3, 40}) {
      Checks({dtype, q_len, false, false}, kernels).run();
      Checks({dtype, q_len, true, true}, kernels).run();
    }
  Checks({DType::f32, 12, true, false}, kernels).run();
  Checks({DType::f32, 12, false, true}, kernels).run();
}

}  // namespace
}  // namespace selfattn::native

int main(int argc, char** argv) {
  using namespace selfattn;
  if (argc != 2) return 2;
  const auto& available = available_kernels();
  const auto found = std::find_if(available.begin(), available.end(),
                                  [&](const KernelSet* kernels) { return std::strcmp(kernels->name, argv[1]) == 0; });
  if (found == available.end()) {
    std::printf("skipped: this machine has no %s\n", argv[1]);
    return test::skipped;
  }
  test::report_faults();
  native::check_all(**found);
  return test::finish(argv[1]);
}
