#include "check.h"

#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <initializer_list>

namespace selfattn::test {
namespace {

constexpr long most_printed = 20;
const char* section = "start";
const char* last_check = "nothing";
long checks = 0;
long failures = 0;

// Counts a check. Returns whether it failed and the failure should be printed.
bool failed(bool passed, const char* what) {
  last_check = what;
  ++checks;
  if (passed) return false;
  return ++failures <= most_printed;
}

void on_fault(int) {
  bool written = true;
  for (const char* text : {"FAIL ", section, ": memory fault after the check of ", last_check, "\n"})
    written = write(STDERR_FILENO, text, std::strlen(text)) > 0 && written;
  _exit(written ? 1 : 2);
}

}  // namespace

void begin_section(const char* name) { section = name; }

void expect(bool passed, const char* what, const char* file, int line) {
  if (failed(passed, what)) std::printf("FAIL %s: %s (%s:%d)\n", section, what, file, line);
}

void expect_same(double got, double expected, const char* what) {
  const bool passed = got == expected || (std::isnan(got) && std::isnan(expected));
  if (failed(passed, what)) std::printf("FAIL %s: %s is %.17g instead of %.17g\n", section, what, got, expected);
}

void expect_at_most(double value, double limit, const char* what) {
  const bool passed = value <= limit;
  std::printf("%s %s: %s %.3g, at most %.3g\n", passed ? "ok  " : "FAIL", section, what, value, limit);
  failed(passed, what);
}

void report_faults() {
  std::signal(SIGSEGV, on_fault);
  std::signal(SIGBUS, on_fault);
}

int finish(const char* title) {
  std::printf("%s: %ld checks, %ld failed\n", title, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace selfattn::test
