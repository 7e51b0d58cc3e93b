// Executes a plan.
#pragma once
#include "plan.h"
#include "problem.h"
#include "task_loop.h"

namespace selfattn {

// Computes problem.out and, where attached, problem.lse and problem.weights. All memory is allocated before anything
// is written; throws std::bad_alloc. Returns false if interrupted, which leaves the outputs unspecified.
bool attend(const Problem& problem, const Plan& plan, Interrupted interrupted);

}  // namespace selfattn
