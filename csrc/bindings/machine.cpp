#include "machine.h"
#include "bindings/attention.h"
#include "kernels/kernel_set.h"
#include "parallel.h"
#include "peaks.h"
#include "registry.h"

#include <pybind11/stl.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <span>

namespace selfattn::bindings {
namespace {

std::vector<std::string> names_of(std::span<const KernelSet* const> sets) {
  std::vector<std::string> names;
  for (const KernelSet* kernels : sets) names.emplace_back(kernels->name);
  return names;
}

py::dict build_config() {
  py::dict d;
  d["compiler"] = SELFATTN_COMPILER;
  d["flags"] = SELFATTN_FLAGS;
  d["build_type"] = SELFATTN_BUILD_TYPE;
#if defined(SELFATTN_OPENMP)
  d["openmp"] = _OPENMP;
#else
  d["openmp"] = py::none();
#endif
  d["isas"] = py::tuple(py::cast(names_of(compiled_kernels())));
  return d;
}

double product_peak(const std::string& isa, const std::string& dtype, double seconds) {
  const KernelSet& kernels = kernels_named(isa);
  const py::gil_scoped_release release;
  const bool on_matrix_unit = dtype == "bfloat16" && kernels.matrix.peak_loop;
  const PeakLoop loop =
      on_matrix_unit ? kernels.matrix.peak_loop : (dtype == "float64" ? kernels.f64 : kernels.f32).peak_loop;
  return measure_product_peak(loop, seconds);
}

double read_bandwidth(std::size_t bytes, int num_threads, double seconds) {
  const py::gil_scoped_release release;
  return measure_read_bandwidth(bytes, num_threads, seconds);
}

// Whether this thread computes subnormal numbers. If some library has disabled them, they become 0.
bool subnormals_survive() {
  volatile float smallest = 1.17549435e-38f;
  volatile float half = smallest * 0.5f;
  return half != 0.0f;
}

}  // namespace

void register_machine(py::module_& module) {
  module.def("isas", [] { return names_of(available_kernels()); });
  module.def("active_isa", [] { return active_kernels().name; });
  module.def("select_isa", &select_kernels);
  module.def("default_threads", [] {
    const ThreadDefault threads = default_threads();
    return py::make_tuple(threads.count, threads.source);
  });
  module.def("set_default_threads", &set_default_threads);
  module.def("parallel_backend", &parallel_backend);
  module.def("share_runtime", [](std::uintptr_t run, std::uintptr_t threads) {
    share_runtime({std::bit_cast<decltype(Runtime::run)>(run), std::bit_cast<decltype(Runtime::threads)>(threads)});
  });
  module.def("affinity_count", &affinity_count);
  module.def("cgroup_quota", &cgroup_quota);
  module.def("cgroup_cpus", &cgroup_cpus);
  module.def("subnormals_survive", &subnormals_survive);
  module.def("build_config", &build_config);
  module.def("measure_product_peak", &product_peak);
  module.def("measure_read_bandwidth", &read_bandwidth);
}

}  // namespace selfattn::bindings
