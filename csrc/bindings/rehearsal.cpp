// The plans of a call, which is made in a rehearsal: nothing is computed.
#include "rehearsal.h"

#include <optional>
#include <vector>

#include "bindings/attention.h"
#include "task_loop.h"

namespace selfattn::bindings {
namespace {

// Recorded without Python's lock, which long calls release.
struct Region {
  Work work;
  int threads;
  std::optional<Plan> plan;
};

class Recorder : public Rehearsal {
 public:
  void add(const Work& work, int threads) override { regions_.push_back({work, threads, {}}); }
  void add(const Plan& plan, int threads) override { regions_.push_back({{}, threads, plan}); }

  py::list description() const {
    py::list found;
    for (const Region& region : regions_) found.append(region.plan ? of_attention(region) : of_work(region));
    return found;
  }

 private:
  static py::dict of_attention(const Region& region) {
    py::dict d;
    d["work"] = "attention";
    for (const auto& [name, value] : description_of(*region.plan, region.threads)) d[name] = value;
    return d;
  }

  static py::dict of_work(const Region& region) {
    py::dict d;
    d["work"] = region.work.name;
    d["tasks"] = region.work.tasks;
    d["threads"] = region.threads;
    d["flops"] = region.work.flops;
    return d;
  }

  std::vector<Region> regions_;
};

// Makes a call in a rehearsal, and describes its parallel regions in their order. The results of the call are dropped.
py::list rehearse(const py::function& call) {
  Recorder recorder;
  call();
  forget_last_call();
  return recorder.description();
}

}  // namespace

void register_rehearsal(py::module_& module) { module.def("rehearse", &rehearse); }

}  // namespace selfattn::bindings
