// Unpacks the arguments that describe a cache: its store, and its ledger or pages.
#pragma once
#include <memory>
#include <optional>

#include "bindings/arrays.h"
#include "cache_step.h"

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

// A cache's arrays (pages, heads, page_size, width), unpacked once for all calls.
struct HeldStore {
  static constexpr const char* capsule_name = "selfattn.CacheStore";

  HeldStore(py::array k, py::array v, py::object k_scales, py::object v_scales, DType dtype, std::int64_t window);
  bool meets(const TensorView& view) const { return meet(view, key) || meet(view, value); }

  const py::array k, v;
  const py::object k_scales, v_scales;  // arrays or None
  const CacheStore store;
  const TensorView key, value;
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

  const py::array pages, lengths;
  const py::object starts;  // an array, or None: all sequences start at 0
};

// One sequence of a PagedKVCache. `pages` is a buffer of int32, see PagedSequence.
struct PagedRow {
  py::object pages = py::none();
  std::int64_t start = 0, length = 0;
};

// The step of a call on a cache, from the cache's store and its sequences: a ledger, a page table, or a list of
// _core.PagedRow.
class CacheArguments {
 public:
  // For a call that appends `more` tokens to each sequence; for `skipped` see CacheSource. Throws like CacheStep.
  CacheArguments(const char* function, py::handle store, py::handle sequences, std::int64_t more,
                 std::int64_t skipped = 0);
  CacheStep& step() { return step_; }
  const Cache& cache() const { return step_.cache(); }
  bool meets(const TensorView& view) const { return held_.meets(view); }

 private:
  CacheSource source(py::handle sequences, std::int64_t skipped) const;

  const HeldStore& held_;
  const Scratch memory_;  // for the PagedSequences of tables and rows
  CacheStep step_;
};

void register_cache(py::module_& module);

}  // namespace selfattn::bindings
