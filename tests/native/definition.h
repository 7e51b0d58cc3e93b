// Attention by its definition, one row at a time in wide precision, to check fuzzed results.
#pragma once
#include <string>

#include "attend_case.h"

namespace selfattn::native {

// Compares rows of the results with the definition, as many as `effort` multiplications allow. In all rows, checks what
// holds for any input of finite, moderate numbers. Returns what is wrong, or an empty text.
std::string judge(const Case& c, const Results& results, double effort);

}  // namespace selfattn::native
