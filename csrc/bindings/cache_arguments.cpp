#include "bindings/cache_arguments.h"

#include <algorithm>
#include <utility>

#include "bindings/record.h"

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

std::size_t memory_bytes(py::handle sequences) {
  if (holds<HeldLedger>(sequences)) return 0;
  const auto count = holds<HeldTable>(sequences) ? held_by<HeldTable>(sequences).lengths.shape(0)
                                                 : static_cast<py::ssize_t>(py::len(sequences));
  return static_cast<std::size_t>(bytes_of(count, sizeof(PagedSequence)));
}

PagedSequence sequence_of(py::handle object) {
  PagedRow& row = Record<PagedRow>::in(object);
  Py_buffer buffer;
  if (PyObject_GetBuffer(row.pages.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  // Releases the buffer at once: the row owns the numbers, and the cache's lock keeps them in place. While a buffer is
  // held, the array cannot grow. In a child process that is forked at that moment, it could never grow.
  PyBuffer_Release(&buffer);
  return {static_cast<const std::int32_t*>(buffer.buf), buffer.len / static_cast<std::int64_t>(sizeof(std::int32_t)),
          row.start, &row.length};
}

void read_table(const HeldTable& table, std::int64_t page_size, PagedSequence* found) {
  std::int64_t* const lengths = integers_of(table.lengths);
  const std::int64_t* const starts =
      table.starts.is_none() ? nullptr : integers_of(py::reinterpret_borrow<py::array>(table.starts));
  const auto* numbers = static_cast<const std::int32_t*>(table.pages.data());
  const std::int64_t width = table.pages.shape(1);
  for (py::ssize_t b = 0; b < table.lengths.shape(0); ++b, numbers += width) {
    const std::int64_t start = starts ? starts[b] : 0, first = std::clamp<std::int64_t>(start / page_size, 0, width);
    found[b] = {numbers + first, width - first, start, lengths + b};
  }
}

}  // namespace

HeldStore::HeldStore(py::array keys, py::array values, py::object key_scales, py::object value_scales, DType dtype,
                     std::int64_t window)
    : k(std::move(keys)),
      v(std::move(values)),
      k_scales(std::move(key_scales)),
      v_scales(std::move(value_scales)),
      store{dtype,
            k.shape(0),
            k.shape(1),
            k.shape(2),
            {rows_of(k), rows_of(k_scales), k.shape(3)},
            {rows_of(v), rows_of(v_scales), v.shape(3)},
            window},
      key(view_of(k, dtype)),
      value(view_of(v, dtype)) {}

HeldLedger::HeldLedger(py::array lengths, py::array which)
    : copies(std::move(lengths)), active(std::move(which)), ledger{integers_of(active), integers_of(copies)} {}

HeldTable::HeldTable(py::array numbers, py::array ends, py::object firsts)
    : pages(std::move(numbers)), lengths(std::move(ends)), starts(std::move(firsts)) {}

CacheArguments::CacheArguments(const char* function, py::handle store, py::handle sequences, std::int64_t more,
                               std::int64_t skipped)
    : held_(held_by<HeldStore>(store)),
      memory_(memory_bytes(sequences)),
      step_(function, source(sequences, skipped), more) {}

CacheSource CacheArguments::source(py::handle sequences, std::int64_t skipped) const {
  const CacheStore& store = held_.store;
  if (holds<HeldLedger>(sequences)) return {&store, &held_by<HeldLedger>(sequences).ledger, nullptr, store.num_pages};
  auto* found = reinterpret_cast<PagedSequence*>(memory_.data());
  if (holds<HeldTable>(sequences)) {
    const HeldTable& table = held_by<HeldTable>(sequences);
    read_table(table, store.page_size, found);
    return {&store, nullptr, found, table.lengths.shape(0), skipped};
  }
  std::int64_t batch = 0;
  for (const py::handle row : py::reinterpret_borrow<py::list>(sequences)) found[batch++] = sequence_of(row);
  return {&store, nullptr, found, batch, skipped};
}

}  // namespace selfattn::bindings
