// Executes plans.
#pragma once
#include "plan.h"
#include "problem.h"
#include "task_loop.h"

namespace selfattn {

// Number of threads worth using for a plan, at most num_threads (0: the default). The number does not affect results.
int threads_for(const Plan& plan, int num_threads);

// Computes problem.out and, if attached, problem.lse and problem.weights. Allocates all memory before anything is
// written; throws std::bad_alloc. Returns false if interrupted; the outputs are then unspecified.
bool attend(const Problem& problem, const Plan& plan, int threads, Interrupted interrupted);

struct Job {
  const Problem* problem;
  const Plan* plan;
};

// threads_for and attend for several problems at once: one team of threads computes the tasks of all problems. The
// problems must have the same type of computation.
int threads_for(const Job* jobs, std::int64_t count, int num_threads);
bool attend(const Job* jobs, std::int64_t count, int threads, Interrupted interrupted);

}  // namespace selfattn
