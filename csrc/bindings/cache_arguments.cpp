#include "bindings/cache_arguments.h"

#include <algorithm>
#include <string>
#include <utility>

#include "message.h"

namespace selfattn::bindings {
namespace {

TokenRows rows_of(const py::object& object) {
  if (object.is_none()) return {};
  const py::array array = py::reinterpret_borrow<py::array>(object);
  TokenRows rows;
  rows.data = static_cast<char*>(const_cast<void*>(array.data()));
  rows.batch = array.strides(0);
  rows.head = array.strides(1);
  rows.row = array.strides(2);
  return rows;
}

std::int64_t* integers_of(const py::array& array) {
  return static_cast<std::int64_t*>(const_cast<void*>(array.data()));
}

template <class T>
bool holds(py::handle object) {
  return PyCapsule_IsValid(object.ptr(), T::capsule_name) != 0;
}

}  // namespace

HeldTokens::HeldTokens(const CacheTokens& from, DType dtype)
    : tokens(py::cast<py::array>(from.rows)), scales(from.scales), width(from.width), view(view_of(tokens, dtype)) {}

Cache::Rows HeldTokens::rows() const { return {rows_of(tokens), rows_of(scales), width}; }

HeldStore::HeldStore(const CacheTokens& k, const CacheTokens& v, DType dtype, std::int64_t window)
    : key(k, dtype),
      value(v, dtype),
      store{dtype, key.tokens.shape(0), key.tokens.shape(1), key.tokens.shape(2), key.rows(), value.rows(), window} {}

HeldLedger::HeldLedger(py::array lengths, py::array which)
    : copies(std::move(lengths)),
      active(std::move(which)),
      ledger(integers_of(active), integers_of(copies), copies.shape(2)) {}

HeldTable::HeldTable(py::array numbers, py::array ends, py::object firsts)
    : pages(std::move(numbers)), lengths(std::move(ends)), starts(std::move(firsts)) {}

std::vector<PagedSequence> HeldTable::sequences(std::int64_t page_size) const {
  std::int64_t* const ends = integers_of(lengths);
  const std::int64_t* const firsts =
      starts.is_none() ? nullptr : integers_of(py::reinterpret_borrow<py::array>(starts));
  const auto* numbers = static_cast<const std::int32_t*>(pages.data());
  const std::int64_t width = pages.shape(1);
  std::vector<PagedSequence> found;
  for (py::ssize_t b = 0; b < lengths.shape(0); ++b, numbers += width) {
    const std::int64_t start = firsts ? firsts[b] : 0, first = std::clamp<std::int64_t>(start / page_size, 0, width);
    found.push_back({numbers + first, width - first, start, ends + b});
  }
  return found;
}

std::int64_t id_of(const char* function, py::handle id) {
  int overflow = 0;
  const std::int64_t value = PyLong_AsLongLongAndOverflow(id.ptr(), &overflow);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (overflow != 0) refuse(function, "sequence"_arg, " ", std::string(py::str(id)), " is not live");
  return value;
}

CacheArguments::CacheArguments(const char* function, Step& step, std::int64_t more, std::int64_t skipped)
    : state_(step),
      held_(held_by<HeldStore>(step.store)),
      more_(more),
      step_(function, source(function, skipped), more) {}

CacheSource CacheArguments::source(const char* function, std::int64_t skipped) const {
  const CacheStore& store = held_.store;
  const py::handle sequences = state_.sequences;
  state_.committed = false;
  if (holds<HeldLedger>(sequences)) return {&store, &held_by<HeldLedger>(sequences).ledger, nullptr, store.num_pages};
  if (holds<HeldTable>(sequences)) {
    state_.pages = std::make_shared<PageChanges>(held_by<HeldTable>(sequences).sequences(store.page_size), more_);
  } else {
    grow(function, held_by<HeldPool>(sequences).pool);
  }
  const auto batch = static_cast<std::int64_t>(state_.pages->sequences().size());
  return {&store, nullptr, state_.pages.get(), batch, skipped};
}

// A Step that served another call has what this one needs, so that most calls allocate nothing here.
void CacheArguments::grow(const char* function, PagePool& pool) const {
  state_.numbers.clear();
  for (const py::handle id : py::reinterpret_borrow<py::list>(state_.ids))
    state_.numbers.push_back(id_of(function, id));
  if (!state_.growth) state_.growth = std::make_shared<PageGrowth>(pool);
  state_.pages = state_.growth;
  state_.growth->begin({function, state_.numbers, more_, held_.store.window});
}

}  // namespace selfattn::bindings
