// Executes plans.
#pragma once
#include "plan.h"
#include "problem.h"
#include "task_loop.h"

namespace selfattn {

// Computes problem.out and, if attached, problem.lse and problem.weights. Allocates all memory before anything is
// written; throws std::bad_alloc. Returns false if interrupted; the outputs are then unspecified.
bool attend(const Problem& problem, const Plan& plan, Interrupted interrupted);

struct Job {
  const Problem* problem;
  const Plan* plan;
};

// Computes several problems at once: one team of threads shares all their tasks. The problems must have the same type
// of computation.
bool attend(const Job* jobs, std::int64_t count, int threads, Interrupted interrupted);

// Number of threads worth using for all jobs together. num_threads is that of make_plan.
int threads_for(const Job* jobs, std::int64_t count, int num_threads);

}  // namespace selfattn
