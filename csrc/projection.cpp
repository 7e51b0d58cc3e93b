#include "projection.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "aligned_memory.h"
#include "key_source.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

// Rows of x that a task takes through one panel: x's block stays in L2 while the panels pass.
constexpr std::int64_t project_rows = 96;

std::int64_t blocks(const ProjectionJob& job) { return (job.x.rows + project_rows - 1) / project_rows; }

std::int64_t task_count(const ProjectionJob& job) { return job.x.outer * blocks(job) * job.projection.panels(); }

double flops(const ProjectionJob& job) {
  return 2.0 * static_cast<double>(job.x.outer) * static_cast<double>(job.x.rows) *
         static_cast<double>(job.projection.depth()) * static_cast<double>(job.projection.columns());
}

bool in_place(const ProjectionJob& job) {
  const std::int64_t size = job.projection.element_size();
  const RowsView& x = job.x;
  bool aligned = reinterpret_cast<std::uintptr_t>(x.data) % static_cast<std::uintptr_t>(size) == 0 &&
                 x.row % size == 0 && x.column == size;
  for (int axis = 0; axis < x.outer_axes; ++axis) aligned = aligned && x.outer_stride[axis] % size == 0;
  return aligned;
}

void run_task(const ProjectionJob& job, std::int64_t task, char* bounce) noexcept {
  const Projection& projection = job.projection;
  const RowsView& x = job.x;
  const std::int64_t panel = task % projection.panels();
  task /= projection.panels();
  const std::int64_t first = task % blocks(job) * project_rows;
  const std::int64_t outer = task / blocks(job);
  const std::int64_t rows = std::min(project_rows, x.rows - first), size = projection.element_size();
  const char* from = x.at(outer) + first * x.row;
  std::int64_t step = x.row;
  if (!in_place(job)) {
    step = projection.depth() * size;
    copy_rows(bounce, step, size, from, x.row, x.column, rows, projection.depth(), size);
    from = bounce;
  }
  char* out = job.out + (outer * x.rows + first) * job.out_step;
  projection.project(panel, from, step / size, rows, out, job.out_step / size);
}

}  // namespace

void Projection::Free::operator()(char* p) const { std::free(p); }

Projection::Projection(const TypeKernels& kernels, const TensorView& weights, const TensorView& bias)
    : kernels_(&kernels), depth_(weights.shape[0]), columns_(weights.shape[1]), size_(size_of(weights.dtype)) {
  const std::int64_t width = kernels.panel_columns;
  const std::int64_t bytes = bytes_of(panels(), depth_, width, size_);
  panels_.reset(allocate_aligned(static_cast<std::size_t>(bytes)));
  std::memset(panels_.get(), 0, static_cast<std::size_t>(bytes));
  const char* from = static_cast<const char*>(weights.data);
  for (std::int64_t first = 0; first < columns_; first += width)
    copy_rows(panels_.get() + first * depth_ * size_, width * size_, size_, from + first * weights.strides[1],
              weights.strides[0], weights.strides[1], depth_, std::min(width, columns_ - first), size_);
  if (!bias) return;
  bias_.reset(allocate_aligned(static_cast<std::size_t>(bytes_of(panels(), width, size_))));
  std::memset(bias_.get(), 0, static_cast<std::size_t>(panels() * width * size_));
  copy_rows(bias_.get(), 0, size_, static_cast<const char*>(bias.data), 0, bias.strides[0], 1, columns_, size_);
}

void Projection::project(std::int64_t panel, const void* x, std::int64_t x_step, std::int64_t rows, void* out,
                         std::int64_t out_step) const noexcept {
  const std::int64_t width = kernels_->panel_columns, first = panel * width;
  kernels_->project({x, x_step, rows, depth_, panels_.get() + first * depth_ * size_,
                     bias_ ? bias_.get() + first * size_ : nullptr, static_cast<char*>(out) + first * size_, out_step,
                     static_cast<int>(std::min(width, columns_ - first))});
}

RowsView::RowsView(const TensorView& x)
    : data(static_cast<const char*>(x.data)),
      rows(x.extent(1)),
      row(x.stride(1)),
      column(x.stride(0)),
      outer_axes(x.ndim - 2),
      outer(1) {
  while (outer_axes > 0 && (x.strides[outer_axes - 1] == rows * row || x.shape[outer_axes - 1] == 1))
    rows *= x.shape[--outer_axes];
  for (int axis = 0; axis < outer_axes; ++axis) {
    outer_shape[axis] = x.shape[axis];
    outer_stride[axis] = x.strides[axis];
    outer *= x.shape[axis];
  }
}

const char* RowsView::at(std::int64_t index) const {
  const char* p = data;
  for (int axis = outer_axes - 1; axis >= 0; --axis) {
    p += index % outer_shape[axis] * outer_stride[axis];
    index /= outer_shape[axis];
  }
  return p;
}

bool project_all(const ProjectionJob* jobs, int count, int num_threads, Interrupted interrupted) {
  std::int64_t tasks = 0;
  double work = 0;
  std::size_t bounce_bytes = 0;
  for (int i = 0; i < count; ++i) {
    tasks += task_count(jobs[i]);
    work += flops(jobs[i]);
    if (!in_place(jobs[i]))
      bounce_bytes = std::max(bounce_bytes, static_cast<std::size_t>(bytes_of(project_rows, jobs[i].projection.depth(),
                                                                              jobs[i].projection.element_size())));
  }
  const int threads = useful_threads(work, 0, tasks, num_threads);
  const Scratch bounce(bounce_bytes * static_cast<std::size_t>(threads));
  TaskLoop loop(tasks, threads, interrupted);
  const auto body = [&](std::int64_t index, int slot) {
    const ProjectionJob* job = jobs;
    for (; index >= task_count(*job); ++job) index -= task_count(*job);
    run_task(*job, index, bounce.data() + bounce_bytes * static_cast<std::size_t>(slot));
  };
  return loop.run(body);
}

}  // namespace selfattn
