// Operands by the distance of query and key: the vectors of relative attention, and T5's table.
#pragma once
#include "problem.h"

namespace selfattn {

// Check these arguments, if they are given, and place them in the problem.
void place_relative(Problem& problem, const AttentionArguments& a);
void place_distance_bias(Problem& problem, const AttentionArguments& a);

}  // namespace selfattn
