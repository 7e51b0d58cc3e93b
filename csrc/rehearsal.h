// Rehearsals: calls that make their plans but compute nothing. While a rehearsal is active on the calling thread,
// regions are recorded instead of run, and caches neither store tokens nor change lengths. All results are then
// unspecified.
#pragma once

namespace selfattn {

struct Plan;
struct Work;

class Rehearsal {
 public:
  Rehearsal() : before_(active_) { active_ = this; }
  virtual ~Rehearsal() { active_ = before_; }
  Rehearsal(const Rehearsal&) = delete;
  Rehearsal& operator=(const Rehearsal&) = delete;

  // That of the calling thread, or null.
  static Rehearsal* active() { return active_; }

  virtual void add(const Work& work, int threads) = 0;
  virtual void add(const Plan& plan, int threads) = 0;  // of attention

 private:
  static thread_local constinit Rehearsal* active_;
  Rehearsal* const before_;
};

}  // namespace selfattn
