// kernel_tests_<isa>: checks the vector operations, functions, loops and kernels of one instruction set.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "backward_checks.h"
#include "check.h"
#include "isa_checks.h"
#include "kernel_set_checks.h"
#include "merge_checks.h"
#include "registry.h"

#define SELFATTN_TEXT_(x) #x
#define SELFATTN_TEXT(x) SELFATTN_TEXT_(x)

int main() {
  using namespace selfattn;
  constexpr const char* isa = SELFATTN_TEXT(SELFATTN_ISA);
  const auto& available = available_kernels();
  const auto found = std::find_if(available.begin(), available.end(),
                                  [](const KernelSet* kernels) { return std::strcmp(kernels->name, isa) == 0; });
  if (found == available.end()) {
    std::printf("skipped: this machine has no %s\n", isa);
    return test::skipped;
  }
  test::report_faults();
  SELFATTN_ISA::check_vectors();
  SELFATTN_ISA::check_narrow();
  SELFATTN_ISA::check_functions();
  SELFATTN_ISA::check_loops();
  SELFATTN_ISA::check_dropout();
  test::check_kernel_set(**found);
  test::check_backward(**found);
  test::check_merge(**found);
  return test::finish(isa);
}
