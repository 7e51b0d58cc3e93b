// Queries the CPU and the operating system: instruction sets, CPU affinity, control group quotas.
#pragma once
#include <cstdint>
#include <string>

namespace selfattn {

// Bits of Feature (kernels/kernel_set.h) that both the CPU and the operating system support.
std::uint32_t cpu_features();

// Number of CPUs that this thread may run on; 0: unknown.
int affinity_count();

// CPU quota of the control group, in CPUs, e.g. 1.5; 0: no limit found. `root` is a prefix of all paths, empty outside
// tests.
double cgroup_quota(const std::string& root);

// The same, rounded up to whole CPUs.
int cgroup_cpus(const std::string& root);

}  // namespace selfattn
