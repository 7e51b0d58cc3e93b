#include "linear.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "carver.h"
#include "rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

// With this many threads, `Blocking` makes tasks as small as possible.
constexpr int most_threads = 1 << 16;
constexpr std::int64_t most_deep_rows = 256;

bool is_deep(const Projection& projection) { return projection.depth() > depth_slice; }

// The smallest number of panels of a task. Kernels multiply a single row by several panels at once. A single panel of
// 16-bit results can end within a cache line, so that two threads would write to that line.
std::int64_t least_panels(const LinearJob& job) { return job.x.rows == 1 ? 4 : is_narrow(job.out_dtype) ? 2 : 1; }

}  // namespace

// A task may have several panels if the weights are deep, i.e. if their depth exceeds one slice. Each slice of the rows
// is then used several times while it is in L2.
std::int64_t most_panels(const LinearJob& job) { return is_deep(job.projection) ? 4 : least_panels(job); }

namespace {

// Elements of a row in the buffer for x: pairs need an even depth, digits are bytes in rows of their own.
std::int64_t x_stride(const Projection& projection) {
  if (projection.digits() > 0)
    return projection.digits() * ((projection.depth() + digit_scale_bytes) / size_of(DType::f32));
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
  return !job.norm && job.projection.digits() == 0 && x.dtype == dtype && aligned &&
         x_stride(job.projection) == job.projection.depth();
}

// Whether nothing follows the product, so that the kernel can write its sums directly to out.
bool plain(const LinearJob& job) {
  return !job.gate && !job.residual && job.activation == Activation::none &&
         job.out_dtype == job.projection.computation();
}

// The largest number of rows of x that a task takes. They stay in L2 from panel to panel. Deep weights are multiplied
// slice by slice, so that only one slice of the rows needs to fit.
std::int64_t most_rows(const LinearJob& job) {
  return is_deep(job.projection) && in_place(job) ? most_deep_rows : LinearSpace::most_rows;
}

// The number of rows whose sums follow() finishes together, while the sums are in L1. follow() reads the weights again
// for every finished_rows rows. With deep weights, it finishes all rows of a task together.
std::int64_t finished_rows(const LinearJob& job) { return is_deep(job.projection) ? most_rows(job) : 32; }

// Whether rows of x are converted to the type of computation first, and then to what the kernel reads.
bool in_two_steps(const LinearJob& job) { return job.norm || job.projection.digits() > 0; }

// Copies rows of x to contiguous rows of what the kernel reads: zero-padded rows of its type, or digits. Normalises
// them first if the job has a norm.
void gather(const LinearJob& job, char* to, char* row, const char* from, std::int64_t rows) {
  const Projection& projection = job.projection;
  const RowsView& x = job.x;
  const DType dtype = operand(job), computation = projection.computation();
  const std::int64_t depth = projection.depth(), stride = x_stride(projection), size = size_of(dtype);
  const KernelSet& kernels = projection.kernels();
  if (!in_two_steps(job) && stride == depth)
    return gather_rows(kernels, to, dtype, {{from, x.row, x.column}, x.dtype}, rows, depth);
  for (std::int64_t r = 0; r < rows; ++r, to += stride * size, from += x.row) {
    const SourceRows source{{from, x.row, x.column}, x.dtype};
    if (in_two_steps(job)) {
      gather_rows(kernels, row, computation, source, 1, depth);
      if (job.norm) normalise(kernels, *job.norm, computation, row, nullptr, depth);
    }
    if (const int digits = projection.digits(); digits > 0) {
      kernels.matrix.split_digits(reinterpret_cast<const float*>(row), depth, digits, to);
      continue;
    }
    if (job.norm)
      scatter_row(kernels, {to, size, dtype}, row, computation, depth);
    else
      gather_rows(kernels, to, dtype, source, 1, depth);
    std::memset(to + depth * size, 0, static_cast<std::size_t>((stride - depth) * size));
  }
}

// How the work of a job is split into tasks.
class Blocking {
 public:
  Blocking(const LinearJob& job, int threads) : x_rows_(job.x.rows), panels_(job.projection.panels()) {
    constexpr std::int64_t whole = 16, tasks_per_thread = 8;
    const std::int64_t blocks = std::max<std::int64_t>(ceil_div(x_rows_, most_rows(job)), 1);
    rows = std::max(round_up(ceil_div(x_rows_, blocks), whole), whole);
    panels =
        std::clamp(job.x.outer * blocks * panels_ / (tasks_per_thread * threads), least_panels(job), most_panels(job));
    tasks = job.x.outer * row_blocks() * panel_tasks();
  }

  LinearBlock block(const LinearJob& job, std::int64_t task) const {
    const std::int64_t panel = task % panel_tasks() * panels, block = task / panel_tasks();
    const std::int64_t first = block % row_blocks() * rows, outer = block / row_blocks();
    return {outer,
            first,
            std::min(rows, x_rows_ - first),
            {panel, std::min(panels, panels_ - panel)},
            job.out + (outer * x_rows_ + first) * job.out_stride};
  }

  std::int64_t rows, panels, tasks;  // rows and panels of a task; number of tasks

 private:
  std::int64_t row_blocks() const { return ceil_div(x_rows_, rows); }
  std::int64_t panel_tasks() const { return ceil_div(panels_, panels); }

  std::int64_t x_rows_, panels_;
};

}  // namespace

// A product of four digits and codes takes as long as one multiply-add.
double flops(const LinearJob& job) {
  const int digits = job.projection.digits();
  return 2.0 * (digits > 0 ? static_cast<double>(digits) / digit_cell : 1) * static_cast<double>(job.x.total()) *
         static_cast<double>(job.projection.depth()) * static_cast<double>(job.projection.columns()) *
         (job.gate ? 2 : 1);
}

const void* kernel_of(const LinearJob& job) { return &job.projection.kernels_of(job.projection.dtype()); }

double weight_bytes(const LinearJob& job) { return static_cast<double>(job.projection.bytes()) * (job.gate ? 2 : 1); }

LinearSpace::LinearSpace(char* base, const LinearJob* jobs, int count, std::int64_t rows) {
  std::int64_t x = 0, row = 0, sums = 0, gates = 0, residual = 0;
  for (const LinearJob* job = jobs; job != jobs + count; ++job) {
    const Projection& projection = job->projection;
    const std::int64_t size = size_of(projection.computation());
    const std::int64_t own = std::min({rows, job->x.rows, selfattn::most_rows(*job)});
    const std::int64_t tile =
        bytes_of(std::min(own, finished_rows(*job)), most_panels(*job), projection.panel_columns(), size);
    if (!in_place(*job)) x = std::max(x, bytes_of(own, x_stride(projection), size_of(operand(*job))));
    if (in_two_steps(*job)) row = std::max(row, bytes_of(projection.depth(), size));
    if (!plain(*job)) sums = std::max(sums, tile);
    if (job->gate) gates = std::max(gates, tile);
    if (job->residual) residual = std::max(residual, tile);
  }
  Carver carver{base};
  held_ = carver.take<Held>(1);
  x_ = carver.take<char>(x);
  row_ = carver.take<char>(row);
  sums_ = carver.take<char>(sums);
  gates_ = carver.take<char>(gates);
  residual_ = carver.take<char>(residual);
  bytes_ = carver.used;
}

void LinearSpace::forget() { *held_ = {}; }

// Compares the number of rows, too: if rows of x overlap, blocks of different lengths may begin with the same row.
bool LinearSpace::holds(const char* from, std::int64_t rows, const LinearJob& job) const {
  if (held_->from != from || held_->rows < rows || !held_->job) return false;
  const LinearJob& other = *held_->job;
  return &other == &job || (other.x.row == job.x.row && other.x.column == job.x.column && other.x.rows == job.x.rows &&
                            other.norm == job.norm && other.projection.depth() == job.projection.depth() &&
                            other.projection.digits() == job.projection.digits() && operand(other) == operand(job));
}

void LinearSpace::run(const LinearJob& job, const LinearBlock& block) noexcept {
  const Projection& projection = job.projection;
  const char* from = job.x.at(block.outer) + block.first * job.x.row;
  std::int64_t stride = job.x.row / size_of(operand(job));
  if (!in_place(job)) {
    if (!holds(from, block.rows, job)) {
      gather(job, x_, row_, from, block.rows);
      *held_ = {from, block.rows, &job};
    }
    from = x_;
    stride = x_stride(projection);
  }
  if (!plain(job)) return follow(job, block, from, stride);
  const std::int64_t size = size_of(job.out_dtype);
  projection.project(block.panels,
                     {operand(job), from, stride, block.rows,
                      block.out + block.panels.first * projection.panel_columns() * size, job.out_stride / size});
}

void LinearSpace::follow(const LinearJob& job, const LinearBlock& block, const char* x, std::int64_t stride) noexcept {
  const Projection& projection = job.projection;
  const std::int64_t size = size_of(job.out_dtype), first = block.panels.first * projection.panel_columns();
  const std::int64_t width = block.panels.count * projection.panel_columns();
  const std::int64_t columns = projection.columns_of(block.panels);
  const auto finish = projection.kernels_of(job.out_dtype).finish;
  const std::int64_t together = finished_rows(job);
  for (std::int64_t done = 0; done < block.rows; done += together) {
    const std::int64_t rows = std::min(together, block.rows - done);
    const char* from = x + done * stride * size_of(operand(job));
    projection.project(block.panels, {operand(job), from, stride, rows, sums_, width});
    if (job.gate) job.gate->project(block.panels, {operand(job), from, stride, rows, gates_, width});
    if (job.residual) {
      const std::int64_t row = job.first_row + block.outer * job.x.rows + block.first + done;
      for (std::int64_t r = 0; r < rows; ++r)
        copy_rows({residual_ + r * width * size, 0, size},
                  {job.residual->at_row(row + r) + first * job.residual->column, 0, job.residual->column}, 1, columns,
                  size);
    }
    finish({job.activation, sums_, job.gate ? gates_ : nullptr, width, job.residual ? residual_ : nullptr, width,
            block.out + done * job.out_stride + first * size, job.out_stride / size, rows, columns});
  }
}

bool run_all(const LinearJob* jobs, int count, int num_threads, Interrupted interrupted) {
  const auto tasks = [&](int threads) {
    return std::accumulate(jobs, jobs + count, std::int64_t{0}, [threads](std::int64_t sum, const LinearJob& job) {
      return sum + Blocking(job, threads).tasks;
    });
  };
  Work work{"linear", kernel_of(*jobs), 0, 0, tasks(most_threads)};
  for (int i = 0; i < count; ++i) {
    work.flops += flops(jobs[i]);
    work.bytes += weight_bytes(jobs[i]);
  }
  const int threads = useful_threads(work, num_threads);
  work.tasks = tasks(threads);
  std::int64_t rows = 0;
  for (int i = 0; i < count; ++i) rows = std::max(rows, Blocking(jobs[i], threads).rows);
  const ThreadScratch memory(LinearSpace(nullptr, jobs, count, rows).bytes(), threads);
  const auto space = [&](int thread) { return LinearSpace(memory.of(thread), jobs, count, rows); };
  for (int thread = 0; thread < threads; ++thread) space(thread).forget();
  TaskLoop loop(work, threads, interrupted);
  const auto body = [&](std::int64_t index, int thread) {
    const LinearJob* job = jobs;
    Blocking blocking(*job, threads);
    for (; index >= blocking.tasks; blocking = Blocking(*++job, threads)) index -= blocking.tasks;
    space(thread).run(*job, blocking.block(*job, index));
  };
  return loop.run(body);
}

}  // namespace selfattn
