// Attention over keys that arrive in pieces. Between two pieces, each row keeps its maximum, its sum and its output
// before normalisation, as kernels leave them (RunningSums). So the pieces of a row are summed like blocks of keys of
// one call, and nothing is merged.
#pragma once
#include <optional>

#include "plan.h"
#include "problem.h"
#include "scratch_pool.h"
#include "task_loop.h"

namespace selfattn {

class AttentionState {
 public:
  AttentionState(std::int64_t kv_len, std::int64_t first) : kv_len_(kv_len), next_(first) {}

  std::int64_t next() const { return next_; }  // the key with which the next piece starts

  // The problem of the piece that starts with key `first`, which must be next(). For the first piece, allocates the
  // memory and fixes the number of KV heads, the width of values and the type of keys. Refuses a later piece that
  // differs.
  Problem problem_of(AttentionArguments arguments, std::int64_t first);

  // Absorbs a piece. Returns false if interrupted. In this case some rows have absorbed the piece and others have not,
  // and the state cannot be used any more.
  bool absorb(const Problem& problem, const Plan& plan, int threads, Interrupted interrupted);

  // The problem of the results; complete after attach_out and attach_lse. Refuses if nothing was absorbed yet.
  const Problem& results(const char* function) const;

  // Writes the results of attention to all keys absorbed so far. Returns false if interrupted; the state is as before.
  bool finish(const Problem& results, const KernelSet& kernels, int num_threads, Interrupted interrupted) const;

  // Throws std::runtime_error if an absorb was not completed.
  void check(const char* function) const;

 private:
  const std::int64_t kv_len_;
  std::int64_t next_;
  std::optional<Scratch> memory_;  // the sums; from the scratch pool, since states often follow one another
  Problem last_;                   // of the last piece, whose keys and values may be gone
  bool begun_ = false;
  bool complete_ = true;
};

}  // namespace selfattn
