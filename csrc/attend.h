// Executes plans.
#pragma once
#include "plan.h"
#include "problem.h"
#include "task_loop.h"

namespace selfattn {

// Computes problem.out and, where attached, problem.lse and problem.weights. All memory is allocated before anything
// is written; throws std::bad_alloc. Returns false if interrupted, which leaves the outputs unspecified.
bool attend(const Problem& problem, const Plan& plan, Interrupted interrupted);

struct Job {
  const Problem* problem;
  const Plan* plan;
};

// The same for several problems of one type of computation at once: their tasks are shared by one team of threads.
bool attend(const Job* jobs, std::int64_t count, int threads, Interrupted interrupted);

// How many threads are of use to all of them together; see make_plan.
int threads_for(const Job* jobs, std::int64_t count, int num_threads);

}  // namespace selfattn
