// Reporting for the native tests. Plain functions, compiled for any CPU: code that is compiled for one instruction
// set must not share inline functions with code for another.
#pragma once

namespace selfattn::test {

constexpr int skipped = 77;  // exit status of a test that this machine cannot run

// Names what the following checks test. Failures and crashes are reported with this name.
void begin_section(const char* name);

void expect(bool passed, const char* what, const char* file, int line);

// Zeros of either sign count as equal, and so do all NaNs.
void expect_same(double got, double expected, const char* what);

// Prints the value even if it passes, to show how close it is to its limit.
void expect_at_most(double value, double limit, const char* what);

// From now on, a memory fault prints the name of the section and ends the program.
void report_faults();

// Prints the number of checks and of failures. Returns the exit status.
int finish(const char* title);

}  // namespace selfattn::test

#define SELFATTN_CHECK(condition) ::selfattn::test::expect((condition), #condition, __FILE__, __LINE__)
