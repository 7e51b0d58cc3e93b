#include "machine.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "kernels/kernel_set.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace selfattn {

#if defined(__x86_64__)
namespace {

std::uint64_t enabled_registers() {
  std::uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

// On Linux a process must request permission to use tiles: once, for all its threads and children.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long ask_for_state = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}

constexpr bool has(std::uint64_t word, std::uint64_t bits) { return (word & bits) == bits; }

}  // namespace

std::uint32_t cpu_features() {
  std::uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  constexpr std::uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  if (!has(c, fma | osxsave | avx | f16c)) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  constexpr std::uint32_t avx2 = 1u << 5;
  constexpr std::uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  constexpr std::uint64_t ymm = 0x06, zmm = 0xe6;  // XCR0: register state that the system saves
  const std::uint64_t registers = enabled_registers();
  std::uint32_t features = 0;
  if (has(b, avx2) && has(registers, ymm)) features |= feature_avx2_fma;
  if (features != 0 && has(b, avx512) && has(registers, zmm)) features |= feature_avx512;
  if (!has(features, feature_avx512)) return features;
  constexpr std::uint32_t avx512_fp16 = 1u << 23, avx512_bf16 = 1u << 5;
  if (has(d, avx512_fp16)) features |= feature_avx512_fp16;
  constexpr std::uint32_t amx = 1u << 22 | 1u << 24;  // BF16, TILE
  constexpr std::uint64_t tiles = 0x60000;
  if (has(d, amx) && has(registers, tiles) && may_use_tiles()) features |= feature_amx;
  constexpr std::uint32_t avx512_vnni = 1u << 11;
  const bool vnni = has(c, avx512_vnni);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && vnni && has(a, avx512_bf16)) features |= feature_avx512_bf16;
  return features;
}
#else
std::uint32_t cpu_features() { return 0; }
#endif

#if defined(__linux__)
namespace {

// A set of CPUs. System calls need a set that is at least as large as the set inside Linux. The size of the set inside
// Linux depends on how Linux was built, but is at most 8192 CPUs. 16 sets of 1024 CPUs are enough.
class CpuSet {
 public:
  CpuSet() { known_ = sched_getaffinity(0, sizeof sets_, sets_) == 0; }  // of the calling thread

  int count() const { return known_ ? CPU_COUNT_S(sizeof sets_, sets_) : 0; }
  void remove(int cpu) { CPU_CLR_S(static_cast<std::size_t>(cpu), sizeof sets_, sets_); }
  void assign_to(pthread_t thread) const { pthread_setaffinity_np(thread, sizeof sets_, sets_); }

 private:
  cpu_set_t sets_[16]{};
  bool known_;
};

}  // namespace

int affinity_count() { return CpuSet().count(); }

ThreadOnCpu ThreadOnCpu::of_this_thread() {
  thread_local const bool movable = affinity_count() > 1;
  ThreadOnCpu found;
  found.thread_ = pthread_self();
  found.cpu_ = sched_getcpu();
  found.movable_ = movable;
  return found;
}

void ThreadOnCpu::make_way() const {
  if (!movable_ || sched_getcpu() != cpu_) return;
  CpuSet cpus;
  if (cpus.count() < 2) return;
  cpus.remove(cpu_);
  cpus.assign_to(thread_);
}
#else
int affinity_count() { return 0; }
ThreadOnCpu ThreadOnCpu::of_this_thread() { return {}; }
void ThreadOnCpu::make_way() const {}
#endif

namespace {

// Parses the whole word as a number; returns 0 unless it is positive and below a bound that no real quota reaches.
double positive(const std::string& word) {
  constexpr double bound = 1e15;
  std::istringstream text(word);
  double number = 0;
  return text >> number && text.eof() && number > 0 && number < bound ? number : 0;
}

double cpus(const std::string& quota, const std::string& period) {
  const double numerator = positive(quota), denominator = positive(period);
  return denominator >= 1 ? numerator / denominator : 0;
}

double read_v2(const std::string& folder) {  // cpu.max: "max 100000" or "150000 100000"
  std::ifstream file(folder + "/cpu.max");
  std::string quota, period;
  file >> quota >> period;
  return cpus(quota, period);
}

double read_v1(const std::string& folder) {  // quota -1: no limit
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  std::string quota, period;
  quota_file >> quota;
  period_file >> period;
  return cpus(quota, period);
}

// The smallest limit of a group and its ancestors, since all of their limits apply.
template <class Read>
double smallest_limit(const std::string& mount, std::string group, Read read) {
  double smallest = 0;
  for (;;) {
    const double limit = read(mount + group);
    if (limit > 0 && (smallest == 0 || limit < smallest)) smallest = limit;
    const std::size_t slash = group.find_last_of('/');
    if (slash == std::string::npos) return smallest;
    group.resize(slash);
  }
}

}  // namespace

double cgroup_quota(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double smallest = 0;
  const auto take = [&](double limit) {
    if (limit > 0 && (smallest == 0 || limit < smallest)) smallest = limit;
  };
  for (std::string line; std::getline(groups, line);) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers(1, ',');
    controllers.append(line, first + 1, second - first - 1).append(1, ',');
    std::string path = line.substr(second + 1);
    if (!path.empty() && path.back() == '/') path.pop_back();
    if (controllers == ",,")
      for (const char* mount : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"})  // the latter if v1 is mounted too
        take(smallest_limit(root + mount, path, read_v2));
    else if (controllers.find(",cpu,") != std::string::npos)
      for (const char* mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"})
        take(smallest_limit(root + mount, path, read_v1));
  }
  return smallest;
}

int cgroup_cpus(const std::string& root) { return static_cast<int>(std::min(std::ceil(cgroup_quota(root)), 1e9)); }

}  // namespace selfattn
