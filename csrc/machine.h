// Queries the CPU and the operating system: instruction sets, CPU affinity, control group quotas.
#pragma once
#include <cstdint>
#include <string>
#if defined(__linux__)
#include <pthread.h>
#endif

namespace selfattn {

// Bits of Feature (kernels/kernel_set.h) that both the CPU and the operating system support.
std::uint32_t cpu_features();

// Number of CPUs that the calling thread may run on; 0: unknown.
int affinity_count();

// A thread, and the CPU on which it ran when this record was made.
class ThreadOnCpu {
 public:
  ThreadOnCpu() = default;  // of no thread
  static ThreadOnCpu of_this_thread();

  // If the calling thread now runs on the recorded CPU, moves the recorded thread to the other CPUs that the calling
  // thread may use. The recorded thread must still exist. A thread that was bound to one CPU from the start, as with
  // OMP_PROC_BIND, is not moved.
  void make_way() const;

 private:
#if defined(__linux__)
  pthread_t thread_{};
  int cpu_ = -1;
  bool movable_ = false;
#endif
};

// CPU quota of the control group, in CPUs, e.g. 1.5; 0: no limit found. `root` is a prefix of all paths, empty outside
// tests.
double cgroup_quota(const std::string& root);

// cgroup_quota, rounded up to whole CPUs.
int cgroup_cpus(const std::string& root);

}  // namespace selfattn
