// Unpacks the arguments that describe a cache: its store, and its ledger or pages.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/operands.h"
#include "cache_step.h"
#include "page_growth.h"

namespace selfattn::bindings {

// Uses a capsule rather than a class: pybind11 registers instances of classes, and terminates the process if an
// allocation fails there.
template <class T>
py::capsule capsule_of(std::unique_ptr<T> held) {
  py::capsule owner(held.get(), T::capsule_name,
                    [](PyObject* capsule) { delete static_cast<T*>(PyCapsule_GetPointer(capsule, T::capsule_name)); });
  static_cast<void>(held.release());  // now owned by the capsule
  return owner;
}

template <class T>
T& held_by(py::handle capsule) {
  void* held = PyCapsule_GetPointer(capsule.ptr(), T::capsule_name);
  if (!held) throw py::error_already_set();
  return *static_cast<T*>(held);
}

// The keys or values of a cache.
struct HeldTokens {
  HeldTokens(const CacheTokens& from, DType dtype);
  Cache::Rows rows() const;

  const py::array tokens;
  const py::object scales;
  const std::int64_t width;
  const TensorView view;
};

// A cache's arrays, unpacked once for all calls.
struct HeldStore {
  static constexpr const char* capsule_name = "selfattn.CacheStore";

  HeldStore(const CacheTokens& k, const CacheTokens& v, DType dtype, std::int64_t window);
  bool meets(const TensorView& view) const { return meet(view, key.view) || meet(view, value.view); }

  const HeldTokens key, value;
  const CacheStore store;
};

struct HeldLedger {
  static constexpr const char* capsule_name = "selfattn.Ledger";

  HeldLedger(py::array copies, py::array active);

  const py::array copies, active;
  const Ledger ledger;
};

// The page table of the sequences of one call: int32 (sequences, pages), where each row starts at token 0.
struct HeldTable {
  static constexpr const char* capsule_name = "selfattn.PageTable";

  HeldTable(py::array pages, py::array lengths, py::object starts);
  std::vector<PagedSequence> sequences(std::int64_t page_size) const;

  const py::array pages, lengths;
  const py::object starts;  // an array, or None: all sequences start at 0
};

struct HeldPool {
  static constexpr const char* capsule_name = "selfattn.PagePool";

  PagePool pool;
};

// The id of a sequence in a pool, from a Python integer of any size.
std::int64_t id_of(const char* function, py::handle id);

// The cache of a call, and the state with which `undo` takes the call back after its commit.
struct Step {
  py::object store = py::none(), sequences = py::none();  // capsules: a store; a ledger, a page table or a pool
  py::object ids = py::none();                            // with a pool: the list of the ids of its sequences
  std::shared_ptr<PageChanges> pages;                     // the page changes of the last call
  std::shared_ptr<PageGrowth> growth;                     // `pages` if there is a pool, else null
  std::vector<std::int64_t> numbers;                      // `ids` as numbers; kept to reuse its memory
  bool committed = false;                                 // whether the last call has changed lengths
};

// The step of a call on a cache.
class CacheArguments {
 public:
  // For a call that appends `more` tokens to each sequence; for `skipped` see CacheSource. Throws like CacheStep and
  // PageGrowth.
  CacheArguments(const char* function, Step& step, std::int64_t more, std::int64_t skipped = 0);
  CacheStep& step() { return step_; }
  const Cache& cache() const { return step_.cache(); }
  bool meets(const TensorView& view) const { return held_.meets(view); }
  // See CacheStep::run.
  template <class Work>
  void run(Work work) {
    step_.run(work);
    state_.committed = more_ != 0 && !Rehearsal::active();
  }

 private:
  CacheSource source(const char* function, std::int64_t skipped) const;
  void grow(const char* function, PagePool& pool) const;

  Step& state_;
  const HeldStore& held_;
  const std::int64_t more_;
  CacheStep step_;
};

void register_cache(py::module_& module);
void register_pages(py::module_& module);

}  // namespace selfattn::bindings
