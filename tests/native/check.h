// Reporting for the native tests. Plain functions, compiled for any CPU: code that is compiled for one instruction
// set must not share inline functions with code for another.
#pragma once

namespace selfattn::test {

constexpr int skipped = 77;  // exit status of a test that this machine cannot run

// Names the subject of the following checks, also in case of a crash.
void begin_section(const char* name);

void expect(bool passed, const char* what, const char* file, int line);

// Zeros of either sign count as equal, and so do all NaNs.
void expect_same(double got, double expected, const char* what);

// Also prints the value, to show how close it is to its limit.
void expect_at_most(double value, double limit, const char* what);

// A memory fault ends the program with the name of the section.
void report_faults();

// Prints the number of checks and of failures. Returns the exit status.
int finish(const char* title);

}  // namespace selfattn::test

#define SELFATTN_CHECK(condition) ::selfattn::test::expect((condition), #condition, __FILE__, __LINE__)
