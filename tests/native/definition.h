// Attention by its definition, one row at a time in wide precision: what fuzzed results are held to.
#pragma once
#include <string>

#include "attend_case.h"

namespace selfattn::native {

// Compares rows of the results, as many as `effort` multiplications allow, with the definition, and all of them with
// what holds for any input of finite, moderate numbers. Returns what is wrong, or an empty text.
std::string judge(const Case& c, const Results& results, double effort);

}  // namespace selfattn::native
