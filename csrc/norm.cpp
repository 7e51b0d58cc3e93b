#include "norm.h"

#include <algorithm>

#include "carver.h"
#include "rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

constexpr std::int64_t rows_per_task = 32;

}  // namespace

void normalise(const KernelSet& kernels, const Norm& norm, DType dtype, char* row, const char* addend,
               std::int64_t count) {
  kernels.computing(dtype).normalise({row, addend, norm.weight, norm.bias, count, norm.epsilon, norm.centred});
}

NormMemory::NormMemory(char* base, std::int64_t count, DType computation) {
  Carver carver{base};
  row = carver.take<char>(bytes_of(count, size_of(computation)));
  addend = carver.take<char>(bytes_of(count, size_of(computation)));
  bytes = carver.used;
}

void normalise_row(const NormJob& job, std::int64_t row, char* scratch) {
  const DType computation = computed_in(job.x.dtype);
  const NormMemory own(scratch, job.count, computation);
  const auto gather = [&](char* to, const RowsView& from, std::int64_t index) {
    gather_rows(job.kernels, to, computation, {{from.at_row(index), from.row, from.column}, from.dtype}, 1, job.count);
  };
  gather(own.row, job.x, row);
  if (job.residual) gather(own.addend, *job.residual, job.first_row + row);
  normalise(job.kernels, job.norm, computation, own.row, job.residual ? own.addend : nullptr, job.count);
  scatter_row(job.kernels, {job.out + row * job.out_stride, size_of(job.out_dtype), job.out_dtype}, own.row,
              computation, job.count);
}

double flops(const NormJob& job) { return 16 * static_cast<double>(job.x.total()) * static_cast<double>(job.count); }

bool normalise_all(const NormJob& job, int num_threads, Interrupted interrupted) {
  const std::int64_t rows = job.x.total(), tasks = ceil_div(rows, rows_per_task);
  const double bytes = 2 * static_cast<double>(rows * job.count * size_of(job.x.dtype));
  const void* kernel = static_cast<const void*>(&job.kernels.computing(computed_in(job.x.dtype)).normalise);
  const Work work{"norm", kernel, flops(job), bytes, tasks};
  const int threads = useful_threads(work, num_threads);
  const ThreadScratch memory(NormMemory(nullptr, job.count, computed_in(job.x.dtype)).bytes, threads);
  TaskLoop loop(work, threads, interrupted);
  const auto body = [&](std::int64_t task, int thread) {
    const std::int64_t first = task * rows_per_task;
    for (std::int64_t row = first; row < std::min(rows, first + rows_per_task); ++row)
      normalise_row(job, row, memory.of(thread));
  };
  return loop.run(body);
}

}  // namespace selfattn
