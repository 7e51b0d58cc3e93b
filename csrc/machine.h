// The only file that asks the CPU and the operating system what there is.
#pragma once
#include <cstdint>
#include <string>

namespace selfattn {

// Bits of Feature (kernels/kernel_set.h) that both the CPU and the operating system support.
std::uint32_t cpu_features();

// CPUs that this thread may run on; 0 where the system does not say.
int affinity_count();

// CPUs' worth of time that the control group allows, e.g. 1.5; 0: no limit found. `root` is "/" outside tests.
double cgroup_quota(const std::string& root);

// The same, rounded up to whole CPUs.
int cgroup_cpus(const std::string& root);

}  // namespace selfattn
