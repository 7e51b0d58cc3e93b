#include "projection.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "aligned_memory.h"
#include "rows.h"
#include "scratch_pool.h"

#define SELFATTN_ISA core  // compiles this header with baseline flags, in namespace core
#include "kernels/scratch.h"

namespace selfattn {
namespace {

// Rows of x that a task multiplies with one panel. The block of x stays in L2 from panel to panel.
constexpr std::int64_t project_rows = 96;

std::int64_t blocks(const ProjectionJob& job) { return ceil_div(job.x.rows, project_rows); }

std::int64_t task_count(const ProjectionJob& job) { return job.x.outer * blocks(job) * job.projection.panels(); }

double flops(const ProjectionJob& job) {
  return 2.0 * static_cast<double>(job.x.outer) * static_cast<double>(job.x.rows) *
         static_cast<double>(job.projection.depth()) * static_cast<double>(job.projection.columns());
}

// Elements of a row in the bounce buffer: pairs need an even depth.
std::int64_t bounce_step(const Projection& projection) {
  return projection.pairs() ? (projection.depth() + 1) / 2 * 2 : projection.depth();
}

bool in_place(const ProjectionJob& job) {
  const RowsView& x = job.x;
  const DType dtype = job.projection.operand();
  const std::int64_t grid = job.projection.pairs() ? 2 * narrow_size : size_of(dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(x.data) % static_cast<std::uintptr_t>(grid) == 0 &&
                 x.row % grid == 0 && x.column == size_of(dtype);
  for (const BatchAxis& axis : x.axes) aligned = aligned && axis.stride % grid == 0;
  return x.dtype == dtype && aligned && bounce_step(job.projection) == job.projection.depth();
}

// Identifies the block of x in the bounce buffer, which the tasks that follow can often reuse: the panels of a block
// follow one another, and so do projections of the same x.
struct Held {
  const char* from;
  const ProjectionJob* job;

  bool is(const char* rows, const ProjectionJob& other) const {
    return from == rows && job &&
           (job == &other || (job->x.row == other.x.row && job->x.column == other.x.column &&
                              job->x.rows == other.x.rows && job->projection.depth() == other.projection.depth()));
  }
};

// One thread's bounce buffers for rows that cannot be used in place.
struct Bounce {
  Held* held;
  char* x;
  char* out;
  std::size_t bytes;

  Bounce(char* base, const ProjectionJob* jobs, int count) {
    std::int64_t x_bytes = 0, out_bytes = 0;
    for (const ProjectionJob* job = jobs; job != jobs + count; ++job) {
      const std::int64_t size = size_of(job->projection.computation());
      const std::int64_t x_size = size_of(job->projection.operand());
      if (!in_place(*job)) x_bytes = std::max(x_bytes, bytes_of(project_rows, bounce_step(job->projection), x_size));
      if (is_narrow(job->out_dtype))
        out_bytes = std::max(out_bytes, bytes_of(project_rows, job->projection.panel_columns(), size));
    }
    core::Carver carver{base};
    const bool needed = x_bytes + out_bytes > 0;
    held = needed ? carver.take<Held>(1) : nullptr;
    x = needed ? carver.take<char>(x_bytes) : nullptr;
    out = needed ? carver.take<char>(out_bytes) : nullptr;
    bytes = carver.used;
  }
};

void gather(const Projection& projection, char* to, const char* from, const RowsView& x, std::int64_t rows) {
  const std::int64_t depth = projection.depth(), step = bounce_step(projection), size = size_of(projection.operand());
  if (step == depth)
    return gather_rows(projection.kernels(), to, projection.operand(), {{from, x.row, x.column}, x.dtype}, rows, depth);
  for (std::int64_t r = 0; r < rows; ++r, to += step * size, from += x.row) {
    gather_rows(projection.kernels(), to, projection.operand(), {{from, x.row, x.column}, x.dtype}, 1, depth);
    std::memset(to + depth * size, 0, static_cast<std::size_t>((step - depth) * size));
  }
}

using Part = StridedRows<char>;  // some rows of a matrix

// The same rows, for reading.
StridedRows<const char> source(const Part& part) { return {part.data, part.row, part.column}; }

void run_task(const ProjectionJob& job, std::int64_t task, const Bounce& bounce) noexcept {
  const Projection& projection = job.projection;
  const RowsView& x = job.x;
  const DType dtype = projection.computation();
  const std::int64_t size = size_of(dtype);
  const std::int64_t panel = task % projection.panels();
  task /= projection.panels();
  const std::int64_t first = task % blocks(job) * project_rows;
  const std::int64_t outer = task / blocks(job);
  const std::int64_t rows = std::min(project_rows, x.rows - first);
  const char* from = x.at(outer) + first * x.row;
  std::int64_t step = x.row;
  if (!in_place(job)) {
    if (!bounce.held->is(from, job)) {
      gather(projection, bounce.x, from, x, rows);
      *bounce.held = {from, &job};
    }
    from = bounce.x;
    step = bounce_step(projection) * size_of(projection.operand());
  }
  char* out = job.out + (outer * x.rows + first) * job.out_step;
  if (!is_narrow(job.out_dtype))
    return projection.project(panel, from, step / size_of(projection.operand()), rows,
                              out + panel * projection.panel_columns() * size, job.out_step / size);
  const std::int64_t width = projection.panel_columns();
  projection.project(panel, from, step / size_of(projection.operand()), rows, bounce.out, width);
  const std::int64_t columns = std::min(width, projection.columns() - panel * width);
  for (std::int64_t r = 0; r < rows; ++r)
    scatter_row(projection.kernels(),
                {out + r * job.out_step + panel * width * narrow_size, narrow_size, job.out_dtype},
                bounce.out + r * width * size, dtype, columns);
}

}  // namespace

void Projection::Free::operator()(char* p) const { std::free(p); }

// Calls copy(packed, plain, rows, columns, size) for rows that are equally spaced both in a panel and in the matrix:
// all rows of a panel, or every other row if pairs of rows share a vector.
template <class Copy>
void Projection::each_part(const TensorView& weights, Copy copy) const {
  const std::int64_t size = size_of(dtype_), width = panel_columns(), together = pairs_ ? 2 : 1;
  const std::int64_t row = weights.strides[0], column = weights.strides[1];
  for (std::int64_t first = 0; first < columns_; first += width) {
    char* panel = panels_.get() + first * panel_rows() * size;
    char* plain = static_cast<char*>(weights.data) + first * column;
    for (std::int64_t i = 0; i < together && i < depth_; ++i)
      copy(Part{panel + i * size, together * width * size, together * size},
           Part{plain + i * row, together * row, column}, ceil_div(depth_ - i, together),
           std::min(width, columns_ - first), size);
  }
}

Projection::Projection(const KernelSet& kernels, const TensorView& weights, const TensorView& bias)
    : kernels_(&kernels),
      types_(computed_in(weights.dtype) == DType::f32 ? &kernels.f32 : &kernels.f64),
      dtype_(weights.dtype),
      pairs_(weights.dtype == DType::bf16 && kernels.matrix.project_bf16 != nullptr),
      depth_(weights.shape[0]),
      columns_(weights.shape[1]) {
  const std::int64_t width = panel_columns(), size = size_of(dtype_), wide = size_of(computation());
  const std::int64_t rows = panel_rows(), bytes = bytes_of(panels(), rows, width, size);
  panels_.reset(allocate_aligned(static_cast<std::size_t>(bytes)));
  std::memset(panels_.get(), 0, static_cast<std::size_t>(bytes));
  each_part(weights, [](Part packed, Part plain, std::int64_t count, std::int64_t columns, std::int64_t bytes) {
    copy_rows(packed, source(plain), count, columns, bytes);
  });
  if (!bias) return;
  bias_.reset(allocate_aligned(static_cast<std::size_t>(bytes_of(panels(), width, wide))));
  std::memset(bias_.get(), 0, static_cast<std::size_t>(panels() * width * wide));
  const SourceRows row{{static_cast<const char*>(bias.data), 0, bias.strides[0]}, bias.dtype};
  gather_rows(kernels, bias_.get(), computation(), row, 1, columns_);
}

std::int64_t Projection::panel_rows() const {
  constexpr std::int64_t whole = 32;  // depth of a tile, in elements
  return pairs_ ? ceil_div(depth_, whole) * whole : depth_;
}

void Projection::unpack(const TensorView& weights) const {
  each_part(weights, [](Part packed, Part plain, std::int64_t count, std::int64_t columns, std::int64_t bytes) {
    copy_rows(plain, source(packed), count, columns, bytes);
  });
}

void Projection::project(std::int64_t panel, const void* x, std::int64_t x_step, std::int64_t rows, void* out,
                         std::int64_t out_step) const noexcept {
  const std::int64_t width = panel_columns(), first = panel * width;
  const auto kernel = pairs_ ? kernels_->matrix.project_bf16 : types_->of(dtype_).project;
  kernel({x, x_step, rows, depth_, panels_.get() + first * panel_rows() * size_of(dtype_),
          bias_ ? bias_.get() + first * size_of(computation()) : nullptr, out, out_step,
          static_cast<int>(std::min(width, columns_ - first))});
}

RowsView::RowsView(const TensorView& x)
    : data(static_cast<const char*>(x.data)), dtype(x.dtype), rows(x.extent(1)), row(x.stride(1)), column(x.stride(0)) {
  int left = x.ndim - 2;
  for (; left > 0 && (x.strides[left - 1] == rows * row || x.shape[left - 1] == 1); --left) rows *= x.shape[left - 1];
  for (; left > 0; --left) {
    axes.push_back({outer, x.shape[left - 1], x.strides[left - 1]});
    outer *= x.shape[left - 1];
  }
}

const char* RowsView::at(std::int64_t index) const {
  const char* p = data;
  for (const BatchAxis& axis : axes) p += index / axis.inside % axis.extent * axis.stride;
  return p;
}

bool project_all(const ProjectionJob* jobs, int count, int num_threads, Interrupted interrupted) {
  std::int64_t tasks = 0;
  double work = 0;
  for (int i = 0; i < count; ++i) {
    tasks += task_count(jobs[i]);
    work += flops(jobs[i]);
  }
  const int threads = useful_threads(work, 0, tasks, num_threads);
  const std::size_t own = Bounce(nullptr, jobs, count).bytes;
  const Scratch memory(own * static_cast<std::size_t>(threads));
  const auto bounce = [&](int slot) {
    return Bounce(memory.data() + own * static_cast<std::size_t>(slot), jobs, count);
  };
  for (int slot = 0; slot < threads; ++slot)
    if (Held* held = bounce(slot).held) *held = {};
  TaskLoop loop(tasks, threads, interrupted);
  const auto body = [&](std::int64_t index, int slot) {
    const ProjectionJob* job = jobs;
    for (; index >= task_count(*job); ++job) index -= task_count(*job);
    run_task(*job, index, bounce(slot));
  };
  return loop.run(body);
}

}  // namespace selfattn
