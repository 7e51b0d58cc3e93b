#include "registry.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "machine.h"

namespace selfattn {

namespace portable {
extern const KernelSet kernels;
}
#if defined(SELFATTN_X86_ISAS)
namespace avx2 {
extern const KernelSet kernels;
}
namespace avx512 {
extern const KernelSet kernels;
}
namespace amx {
extern const KernelSet kernels;
}
namespace avx512_bf16 {
extern const KernelSet kernels;
}
#endif
#if defined(SELFATTN_EMULATES_AMX)
namespace amx_emulated {
extern const KernelSet kernels;
}
#endif
#if defined(SELFATTN_ARM_ISAS)
namespace neon {
extern const KernelSet kernels;
}
#endif

namespace {

// Best first.
constexpr const KernelSet* all_kernels[] = {
#if defined(SELFATTN_X86_ISAS)
    &amx::kernels,          &avx512_bf16::kernels, &avx512::kernels, &avx2::kernels,
#endif
#if defined(SELFATTN_ARM_ISAS)
    &neon::kernels,
#endif
    &portable::kernels,
#if defined(SELFATTN_EMULATES_AMX)
    &amx_emulated::kernels,  // for tests: never the default
#endif
};

std::atomic<const KernelSet*> active{nullptr};

const KernelSet& default_kernels() {
  const char* name = std::getenv("SELFATTN_ISA");
  if (name && *name) return kernels_named(name);
  const std::uint32_t features = cpu_features();
  const auto& available = available_kernels();
  return **std::find_if(available.begin(), available.end(),
                        [&](const KernelSet* kernels) { return (kernels->not_default_with & features) == 0; });
}

}  // namespace

std::span<const KernelSet* const> compiled_kernels() { return all_kernels; }

const std::vector<const KernelSet*>& available_kernels() {
  static const std::vector<const KernelSet*> available = [] {
    std::vector<const KernelSet*> usable;
    const std::uint32_t features = cpu_features();
    for (const KernelSet* kernels : all_kernels)
      if ((kernels->features & features) == kernels->features) usable.push_back(kernels);
    return usable;
  }();
  return available;
}

const KernelSet& kernels_named(const std::string& name) {
  std::string names;
  for (const KernelSet* kernels : available_kernels()) {
    if (name == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("SELFATTN_ISA: '" + name +
                              "' is not an instruction set that this machine can run; available: " + names);
}

const KernelSet& active_kernels() {
  const KernelSet* kernels = active.load(std::memory_order_relaxed);
  if (!kernels) {
    kernels = &default_kernels();
    active.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

void select_kernels(const std::string& name) { active.store(&kernels_named(name), std::memory_order_relaxed); }

}  // namespace selfattn
