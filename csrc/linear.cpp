#include "linear.h"

#include <algorithm>
#include <cstring>

#include "rows.h"
#include "scratch_pool.h"

#define SELFATTN_ISA core  // compiles this header with baseline flags, in namespace core
#include "kernels/scratch.h"

namespace selfattn {
namespace {

// Rows whose sums are finished together, and panels that a task multiplies with a single row. What follows the product
// is computed while the sums are in L1.
constexpr std::int64_t finished_rows = 32, row_panels = 4;
// Panels of a task whose results have 16 bits: one panel would end within a cache line, which two threads would write.
constexpr std::int64_t narrow_panels = 2;

// Blocks of x are equally large. A block stays in L2 from panel to panel.
std::int64_t block_rows(const LinearJob& job) {
  constexpr std::int64_t whole = 16;
  const std::int64_t blocks = std::max<std::int64_t>(ceil_div(job.x.rows, LinearSpace::most_rows), 1);
  return std::max(round_up(ceil_div(job.x.rows, blocks), whole), whole);
}
std::int64_t blocks(const LinearJob& job) { return ceil_div(job.x.rows, block_rows(job)); }

std::int64_t task_panels(const LinearJob& job) {
  return job.x.rows == 1 ? row_panels : is_narrow(job.out_dtype) ? narrow_panels : 1;
}
std::int64_t panel_tasks(const LinearJob& job) { return ceil_div(job.projection.panels(), task_panels(job)); }
std::int64_t task_count(const LinearJob& job) { return job.x.outer * blocks(job) * panel_tasks(job); }

// Elements of a row in the buffer for x: pairs need an even depth.
std::int64_t x_step(const Projection& projection) {
  return projection.pairs() ? round_up(projection.depth(), 2) : projection.depth();
}

DType operand(const LinearJob& job) { return job.projection.operand(job.x.dtype); }

bool in_place(const LinearJob& job) {
  const RowsView& x = job.x;
  const DType dtype = operand(job);
  const std::int64_t grid = job.projection.pairs() ? 2 * size_of(dtype) : size_of(dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(x.data) % static_cast<std::uintptr_t>(grid) == 0 &&
                 x.row % grid == 0 && x.column == size_of(dtype);
  for (const BatchAxis& axis : x.axes) aligned = aligned && axis.stride % grid == 0;
  return !job.norm && x.dtype == dtype && aligned && x_step(job.projection) == job.projection.depth();
}

// Whether the sums are the result, so that the kernel can write them to out.
bool plain(const LinearJob& job) {
  return !job.gate && !job.residual && job.activation == Activation::none &&
         job.out_dtype == job.projection.computation();
}

// Rows of x become contiguous rows of the type that the kernel reads.
void gather(const LinearJob& job, char* to, char* row, const char* from, std::int64_t rows) {
  const Projection& projection = job.projection;
  const RowsView& x = job.x;
  const DType dtype = operand(job), computation = projection.computation();
  const std::int64_t depth = projection.depth(), step = x_step(projection), size = size_of(dtype);
  const KernelSet& kernels = projection.kernels();
  if (!job.norm && step == depth)
    return gather_rows(kernels, to, dtype, {{from, x.row, x.column}, x.dtype}, rows, depth);
  for (std::int64_t r = 0; r < rows; ++r, to += step * size, from += x.row) {
    const SourceRows source{{from, x.row, x.column}, x.dtype};
    if (job.norm) {
      gather_rows(kernels, row, computation, source, 1, depth);
      normalise(kernels, *job.norm, computation, row, nullptr, depth);
      scatter_row(kernels, {to, size, dtype}, row, computation, depth);
    } else {
      gather_rows(kernels, to, dtype, source, 1, depth);
    }
    std::memset(to + depth * size, 0, static_cast<std::size_t>((step - depth) * size));
  }
}

}  // namespace

double flops(const LinearJob& job) {
  return 2.0 * static_cast<double>(job.x.total()) * static_cast<double>(job.projection.depth()) *
         static_cast<double>(job.projection.columns()) * (job.gate ? 2 : 1);
}

double weight_bytes(const LinearJob& job) { return static_cast<double>(job.projection.bytes()) * (job.gate ? 2 : 1); }

LinearSpace::LinearSpace(char* base, const LinearJob* jobs, int count) {
  std::int64_t x = 0, row = 0, sums = 0, gates = 0, residual = 0;
  for (const LinearJob* job = jobs; job != jobs + count; ++job) {
    const Projection& projection = job->projection;
    const std::int64_t size = size_of(projection.computation());
    const std::int64_t tile =
        bytes_of(std::min(job->x.rows, finished_rows), task_panels(*job), projection.panel_columns(), size);
    if (!in_place(*job)) x = std::max(x, bytes_of(most_rows, x_step(projection), size_of(operand(*job))));
    if (job->norm) row = std::max(row, bytes_of(projection.depth(), size));
    if (!plain(*job)) sums = std::max(sums, tile);
    if (job->gate) gates = std::max(gates, tile);
    if (job->residual) residual = std::max(residual, tile);
  }
  core::Carver carver{base};
  held_ = carver.take<Held>(1);
  x_ = carver.take<char>(x);
  row_ = carver.take<char>(row);
  sums_ = carver.take<char>(sums);
  gates_ = carver.take<char>(gates);
  residual_ = carver.take<char>(residual);
  bytes_ = carver.used;
}

void LinearSpace::forget() { *held_ = {}; }

bool LinearSpace::holds(const char* rows, const LinearJob& job) const {
  if (held_->from != rows || !held_->job) return false;
  const LinearJob& other = *held_->job;
  return &other == &job || (other.x.row == job.x.row && other.x.column == job.x.column && other.x.rows == job.x.rows &&
                            other.norm == job.norm && other.projection.depth() == job.projection.depth() &&
                            operand(other) == operand(job));
}

void LinearSpace::run(const LinearJob& job, const LinearBlock& block) noexcept {
  const Projection& projection = job.projection;
  const char* from = job.x.at(block.outer) + block.first * job.x.row;
  std::int64_t step = job.x.row / size_of(operand(job));
  if (!in_place(job)) {
    if (!holds(from, job)) {
      gather(job, x_, row_, from, block.rows);
      *held_ = {from, &job};
    }
    from = x_;
    step = x_step(projection);
  }
  if (!plain(job)) return follow(job, block, from, step);
  const std::int64_t size = size_of(job.out_dtype);
  projection.project(block.panels, operand(job), from, step, block.rows,
                     block.out + block.panels.first * projection.panel_columns() * size, job.out_step / size);
}

void LinearSpace::follow(const LinearJob& job, const LinearBlock& block, const char* x, std::int64_t step) noexcept {
  const Projection& projection = job.projection;
  const std::int64_t size = size_of(job.out_dtype), first = block.panels.first * projection.panel_columns();
  const std::int64_t width = block.panels.count * projection.panel_columns();
  const std::int64_t columns = projection.columns_of(block.panels);
  const auto finish = projection.kernels_of(job.out_dtype).finish;
  for (std::int64_t done = 0; done < block.rows; done += finished_rows) {
    const std::int64_t rows = std::min(finished_rows, block.rows - done);
    const char* from = x + done * step * size_of(operand(job));
    projection.project(block.panels, operand(job), from, step, rows, sums_, width);
    if (job.gate) job.gate->project(block.panels, operand(job), from, step, rows, gates_, width);
    if (job.residual) {
      const std::int64_t row = job.first_row + block.outer * job.x.rows + block.first + done;
      for (std::int64_t r = 0; r < rows; ++r)
        copy_rows({residual_ + r * width * size, 0, size},
                  {job.residual->at_row(row + r) + first * job.residual->column, 0, job.residual->column}, 1, columns,
                  size);
    }
    finish({job.activation, sums_, job.gate ? gates_ : nullptr, width, job.residual ? residual_ : nullptr, width,
            block.out + done * job.out_step + first * size, job.out_step / size, rows, columns});
  }
}

bool run_all(const LinearJob* jobs, int count, int num_threads, Interrupted interrupted) {
  Work work{&jobs->projection.kernels(), 0, 0, 0};
  for (int i = 0; i < count; ++i) {
    work.tasks += task_count(jobs[i]);
    work.flops += flops(jobs[i]);
    work.bytes += weight_bytes(jobs[i]);
  }
  const int threads = useful_threads(work, num_threads);
  const std::size_t own = LinearSpace(nullptr, jobs, count).bytes();
  const Scratch memory(own * static_cast<std::size_t>(threads));
  const auto space = [&](int thread) {
    return LinearSpace(memory.data() + own * static_cast<std::size_t>(thread), jobs, count);
  };
  for (int thread = 0; thread < threads; ++thread) space(thread).forget();
  TaskLoop loop(work, threads, interrupted);
  const auto body = [&](std::int64_t index, int thread) {
    const LinearJob* job = jobs;
    for (; index >= task_count(*job); ++job) index -= task_count(*job);
    const std::int64_t panel = index % panel_tasks(*job) * task_panels(*job);
    index /= panel_tasks(*job);
    const std::int64_t first = index % blocks(*job) * block_rows(*job), outer = index / blocks(*job);
    space(thread).run(*job, {outer,
                             first,
                             std::min(block_rows(*job), job->x.rows - first),
                             {panel, std::min(task_panels(*job), job->projection.panels() - panel)},
                             job->out + (outer * job->x.rows + first) * job->out_step});
  };
  return loop.run(body);
}

}  // namespace selfattn
