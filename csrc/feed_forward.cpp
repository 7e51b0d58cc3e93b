#include "feed_forward.h"

#include <algorithm>

#include "carver.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

// With fewer rows per thread than this, all threads share each product, so that each thread reads only some of the
// weights.
constexpr std::int64_t rows_per_thread = 48;

LinearJob first_job(const FeedForwardJob& job) {
  const LinearWeights& layer = job.first;
  const DType dtype = job.second.projection.operand(job.dtype);
  return {layer.projection,
          job.x,
          nullptr,
          dtype,
          layer.projection.columns() * size_of(dtype),
          job.norm,
          layer.gate ? &*layer.gate : nullptr,
          layer.activation};
}

// The job adds the residual. If a norm follows, the caller removes the residual from the job. The norm then adds the
// residual, to sums that are not rounded yet.
LinearJob second_job(const FeedForwardJob& job) {
  const Projection& projection = job.second.projection;
  return {.projection = projection,
          .x = RowsView(nullptr, projection.operand(job.dtype), job.x.total(), projection.depth()),
          .out = job.out,
          .out_dtype = job.dtype,
          .out_stride = projection.columns() * size_of(job.dtype),
          .residual = job.residual};
}

// Each task computes both products for a block of rows, so that the result of the first product stays in the cache.
class RowTasks {
 public:
  RowTasks(const FeedForwardJob& job, const LinearJob& first, const LinearJob& second, int threads)
      : job_(job),
        blocks_(ceil_div(job.x.rows, LinearSpace::most_rows * threads) * threads),
        block_rows_(std::min(round_up(ceil_div(job.x.rows, blocks_), 8), LinearSpace::most_rows)),
        jobs_{first, for_blocks(second)},
        memory_(Space(*this, nullptr).bytes, threads) {}

  bool run(const Work& work, int threads, Interrupted interrupted) {
    const std::int64_t blocks = ceil_div(job_.x.rows, block_rows_);
    TaskLoop loop({work.name, work.kernel, work.flops, work.bytes, job_.x.outer * blocks}, threads, interrupted);
    const auto body = [&](std::int64_t task, int thread) {
      const std::int64_t first = task % blocks * block_rows_;
      run_block(task / blocks, first, std::min(block_rows_, job_.x.rows - first), Space(*this, memory_.of(thread)));
    };
    return loop.run(body);
  }

 private:
  // One thread's memory.
  struct Space {
    char *hidden, *wide, *norm;
    LinearSpace linear;
    std::size_t bytes;

    Space(const RowTasks& tasks, char* base) : Space(tasks, Carver{base}) {}
    Space(const RowTasks& tasks, Carver carver)
        : hidden(carver.take<char>(tasks.block_rows_ * tasks.jobs_[0].out_stride)),
          wide(carver.take<char>(tasks.job_.post_norm ? tasks.block_rows_ * tasks.jobs_[1].out_stride : 0)),
          norm(carver.take<char>(tasks.norm_bytes())),
          linear(carver.base ? carver.base + carver.used : nullptr, tasks.jobs_, 2, tasks.block_rows_),
          bytes(carver.used + linear.bytes()) {}
  };

  // The second product of one block. If a norm follows, the sums are not rounded before the norm.
  LinearJob for_blocks(LinearJob second) const {
    second.x.rows = block_rows_;
    if (!job_.post_norm) return second;
    second.out_dtype = computation();
    second.out_stride = columns() * size_of(computation());
    second.residual = nullptr;
    return second;
  }
  std::int64_t columns() const { return job_.second.projection.columns(); }
  DType computation() const { return job_.second.projection.computation(); }
  std::int64_t norm_bytes() const {
    return job_.post_norm ? static_cast<std::int64_t>(NormMemory(nullptr, columns(), computation()).bytes) : 0;
  }

  static void run_panels(LinearSpace& space, const LinearJob& job, LinearBlock block) {
    space.forget();
    const std::int64_t panels = job.projection.panels(), most = most_panels(job);
    for (std::int64_t first = 0; first < panels; first += most) {
      block.panels = {first, std::min(most, panels - first)};
      space.run(job, block);
    }
  }

  void run_block(std::int64_t outer, std::int64_t first_row, std::int64_t rows, Space space) const {
    const std::int64_t row = outer * job_.x.rows + first_row;
    run_panels(space.linear, jobs_[0], {outer, first_row, rows, {}, space.hidden});
    LinearJob second = jobs_[1];
    second.x.data = space.hidden;
    second.first_row = row;
    run_panels(space.linear, second,
               {0, 0, rows, {}, job_.post_norm ? space.wide : job_.out + row * second.out_stride});
    if (!job_.post_norm) return;
    const std::int64_t stride = columns() * size_of(job_.dtype);
    const NormJob norm{job_.first.projection.kernels(),
                       *job_.post_norm,
                       columns(),
                       RowsView(space.wide, computation(), rows, columns()),
                       job_.residual,
                       job_.out + row * stride,
                       job_.dtype,
                       stride,
                       row};
    for (std::int64_t r = 0; r < rows; ++r) normalise_row(norm, r, space.norm);
  }

  const FeedForwardJob& job_;
  const std::int64_t blocks_, block_rows_;
  const LinearJob jobs_[2];
  const ThreadScratch memory_;
};

}  // namespace

bool run_normalised(const LinearJob& job, const Norm* norm, int num_threads, Interrupted interrupted) {
  if (!norm) return run_all(&job, 1, num_threads, interrupted);
  const std::int64_t columns = job.projection.columns(), rows = job.x.total();
  const DType wide = job.projection.computation();
  const Scratch sums(static_cast<std::size_t>(bytes_of(rows, columns, size_of(wide))));
  LinearJob product = job;
  product.out = sums.data();
  product.out_dtype = wide;
  product.out_stride = columns * size_of(wide);
  product.residual = nullptr;
  return run_all(&product, 1, num_threads, interrupted) &&
         normalise_all({job.projection.kernels(), *norm, columns, RowsView(sums.data(), wide, rows, columns),
                        job.residual, job.out, job.out_dtype, job.out_stride},
                       num_threads, interrupted);
}

FeedForward::FeedForward(const FeedForwardJob& job) : job_(job), first_(first_job(job)), second_(second_job(job)) {}

bool FeedForward::run(int num_threads, Interrupted interrupted) const {
  const std::int64_t rows = job_.x.total();
  if (rows == 0) return true;
  Work work{"feed-forward", kernel_of(first_), flops(*this), 0, ceil_div(rows, rows_per_thread)};
  const int threads = useful_threads(work, num_threads);
  work.tasks = rows;
  if (rows >= 2 * rows_per_thread && useful_threads(work, num_threads) == threads)
    return RowTasks(job_, first_, second_, threads).run(work, threads, interrupted);
  const Scratch hidden(static_cast<std::size_t>(bytes_of(rows, first_.out_stride)));
  LinearJob first = first_, second = second_;
  first.out = hidden.data();
  second.x.data = hidden.data();
  return run_all(&first, 1, num_threads, interrupted) &&
         run_normalised(second, job_.post_norm, num_threads, interrupted);
}

}  // namespace selfattn
