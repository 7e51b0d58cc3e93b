// Attention by its definition, one row at a time in long double, to check results.
#pragma once
#include <string>

#include "attend_case.h"

namespace selfattn::native {

// Compares some rows of the results with the definition, as many as about `effort` multiplications allow. Checks in all
// rows that outputs are finite. The numbers of the case must be finite and moderate. Returns what is wrong, or an empty
// text.
std::string judge(const Case& c, const Results& results, double effort);

}  // namespace selfattn::native
