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

// One of these calls: its few tasks split the keys.
Case decode();

// A call that is far too long to finish. All heads have the same memory.
Case endless();

}  // namespace selfattn::native
