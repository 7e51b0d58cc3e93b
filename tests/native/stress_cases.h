// The calls that stress_threads computes.
#pragma once
#include <string>
#include <vector>

#include "attend_case.h"

namespace selfattn::native {

enum class Keys { whole, split };  // whether one task sees all keys, or the results of several are merged

struct StressCase {
  std::string name;
  Keys keys;
  Case input;
};

std::vector<StressCase> stress_cases();

// One of these calls. It has so few rows that its keys are split.
Case decode();

// A call that would take far too long to finish. All its heads share the same memory.
Case endless();

}  // namespace selfattn::native
