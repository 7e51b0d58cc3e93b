// merge_states(), which is also the last step of a cascade.
#include "merge.h"

#include <vector>

#include "bindings/attention.h"
#include "registry.h"

namespace selfattn::bindings {
namespace {

State state_of(py::handle out, py::handle lse) {
  return {float_view("merge_states", "outs", out), float_view("merge_states", "lses", lse)};
}

// The Python layer has checked shapes and dtypes.
void merge(const py::list& outs, const py::list& lses, py::handle out, py::handle lse, int num_threads) {
  std::vector<State> parts;
  parts.reserve(outs.size());
  for (std::size_t i = 0; i < outs.size(); ++i) parts.push_back(state_of(outs[i], lses[i]));
  const State merged = state_of(out, lse);
  bool finished;
  {
    const double elements = static_cast<double>(py::reinterpret_borrow<py::array>(out).size());
    const CoreCall call_of_core(elements * static_cast<double>(parts.size()));
    finished = merge_states(active_kernels(), parts, merged, num_threads, interrupted);
  }
  if (!finished) throw py::error_already_set();
}

}  // namespace

void register_merge(py::module_& module) { module.def("merge_states", &merge); }

}  // namespace selfattn::bindings
