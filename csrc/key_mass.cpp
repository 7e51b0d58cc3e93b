#include "key_mass.h"

#include <algorithm>

#include "carver.h"

namespace selfattn {
namespace {

std::int64_t group_sums(const Problem& problem) { return problem.group_size * problem.kv_len; }

template <class T>
void write_mass(const Problem& problem, std::int64_t kv_index, const double* sums) {
  const std::int64_t first_head = kv_index % problem.num_kv_heads * problem.group_size;
  char* mass = problem.at(problem.key_mass, kv_index / problem.num_kv_heads) + first_head * problem.key_mass.head;
  for (std::int64_t head = 0; head < problem.group_size; ++head, mass += problem.key_mass.head, sums += problem.kv_len)
    std::transform(sums, sums + problem.kv_len, reinterpret_cast<T*>(mass), [](double x) { return static_cast<T>(x); });
}

}  // namespace

double* KeyMass::of(const Plan& plan, const Problem& problem, std::int64_t kv_index, std::int64_t row_block) const {
  const std::int64_t size = group_sums(problem);
  double* own = sums + (kv_index * plan.row_tasks + row_block % plan.row_tasks) * size;
  if (row_block < plan.row_tasks) std::fill_n(own, size, 0.0);
  return own;
}

void KeyMass::finish(const Plan& plan, const Problem& problem, std::int64_t kv_index) const {
  // Acquire-release makes the other tasks' sums visible to the last one.
  if (finished[kv_index].fetch_add(1, std::memory_order_acq_rel) + 1 < plan.row_tasks) return;
  const std::int64_t size = group_sums(problem);
  double* total = sums + kv_index * plan.row_tasks * size;
  for (std::int64_t task = 1; task < plan.row_tasks; ++task)
    for (std::int64_t i = 0; i < size; ++i) total[i] += total[task * size + i];
  with_type(problem.dtype, [&]<class T> { write_mass<T>(problem, kv_index, total); });
}

KeyMass take_key_mass(core::Carver& carver, const Plan& plan, const Problem& problem) {
  KeyMass mass;
  mass.kv_heads = problem.key_mass ? problem.batch * problem.num_kv_heads : 0;
  mass.sums = carver.take<double>(mass.kv_heads * plan.row_tasks * group_sums(problem));
  mass.finished = carver.take<std::atomic<std::int32_t>>(mass.kv_heads);
  return mass;
}

}  // namespace selfattn
