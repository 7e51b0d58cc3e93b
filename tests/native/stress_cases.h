// What the program with concurrent threads computes.
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

// One of them, of few tasks that split the keys.
Case decode();

// Far too long to finish; every head is the same memory.
Case endless();

}  // namespace selfattn::native
