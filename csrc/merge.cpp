#include "merge.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rows.h"
#include "scratch_pool.h"

namespace selfattn {
namespace {

constexpr std::int64_t run = 256;  // columns summed at a time, so that the sums stay in L1
constexpr std::int64_t elements_per_task = 1 << 14;
constexpr double infinity = std::numeric_limits<double>::infinity();

// One row of a part.
struct Source {
  const char* out;
  const char* lse;
  double weight;
};

// Iterates over rows along the longest axis. A line consists of all rows along that axis, for one index along each of
// the other axes.
class Lines {
 public:
  explicit Lines(const TensorView& lse) : axes_(lse.ndim), shape_(lse.shape) {
    for (int axis = axes_ - 1; axis >= 0; --axis) {
      if (along_ < 0 || shape_[axis] > shape_[along_]) along_ = axis;
      rows_ *= shape_[axis];
    }
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t length() const { return along_ < 0 ? 1 : shape_[along_]; }
  std::int64_t stride(const TensorView& view) const { return along_ < 0 ? 0 : view.strides[along_]; }
  char* row(const TensorView& view, std::int64_t line, std::int64_t index) const {
    std::int64_t offset = index * stride(view);
    for (int axis = axes_ - 1; axis >= 0; --axis) {
      if (axis == along_) continue;
      offset += line % shape_[axis] * view.strides[axis];
      line /= shape_[axis];
    }
    return static_cast<char*>(view.data) + offset;
  }

 private:
  const int axes_;
  const std::int64_t* const shape_;
  int along_ = -1;
  std::int64_t rows_ = 1;
};

// Sets the weights of a row's parts and returns the log-sum-exp of all parts. The weights sum to 1, or are all 0 if all
// parts have lse -inf. A part with lse -inf always gets weight 0. If the lse of a part is NaN, all weights and the
// result are NaN. The same holds for +inf, because inf - inf is NaN.
double weigh(std::span<Source> sources, DType type) {
  double peak = -infinity, total = 0;
  for (Source& source : sources) {
    source.weight = read_real(source.lse, type);
    if (source.weight > peak) peak = source.weight;
  }
  const double shift = peak == -infinity ? 0 : peak;
  for (Source& source : sources) {
    source.weight = std::exp(source.weight - shift);
    total += source.weight;
  }
  if (total == 0) return -infinity;
  for (Source& source : sources) source.weight /= total;
  return shift + std::log(total);
}

// The elements may be unaligned.
template <class T>
void add_weighted(double* sum, const char* from, std::int64_t count, double weight) {
  for (std::int64_t i = 0; i < count; ++i) {
    T x;
    std::memcpy(&x, from + i * static_cast<std::int64_t>(sizeof x), sizeof x);
    sum[i] += weight * static_cast<double>(x);
  }
}

class Merge {
 public:
  Merge(const KernelSet& kernels, std::span<const State> parts, const State& merged, int num_threads)
      : kernels_(kernels),
        parts_(parts),
        merged_(merged),
        lines_(merged.lse),
        columns_(merged.out.extent(0)),
        block_(std::max<std::int64_t>(elements_per_task / std::max<std::int64_t>(columns_, 1), 1)),
        blocks_(ceil_div(lines_.length(), block_)),
        tasks_(lines_.rows() == 0 ? 0 : lines_.rows() / lines_.length() * blocks_),
        threads_(useful_threads(work(), num_threads)),
        memory_(static_cast<std::size_t>(bytes_of(parts.size(), sizeof(Source))), threads_) {}

  bool run_tasks(Interrupted interrupted) {
    TaskLoop loop(work(), threads_, interrupted);
    return loop.run(*this);
  }

  void operator()(std::int64_t task, int thread) const {
    const std::int64_t line = task / blocks_, first = task % blocks_ * block_;
    const std::int64_t count = std::min(block_, lines_.length() - first);
    const std::span sources(reinterpret_cast<Source*>(memory_.of(thread)), parts_.size());
    for (std::size_t p = 0; p < sources.size(); ++p)
      sources[p] = {lines_.row(parts_[p].out, line, first), lines_.row(parts_[p].lse, line, first), 0};
    char* out = lines_.row(merged_.out, line, first);
    char* lse = lines_.row(merged_.lse, line, first);
    for (std::int64_t row = 0; row < count; ++row) {
      write_real(lse, weigh(sources, merged_.lse.dtype), merged_.lse.dtype);
      for (std::int64_t column = 0; column < columns_; column += run)
        merge_run(sources, out, column, std::min(run, columns_ - column));
      for (std::size_t p = 0; p < sources.size(); ++p) {
        sources[p].out += lines_.stride(parts_[p].out);
        sources[p].lse += lines_.stride(parts_[p].lse);
      }
      out += lines_.stride(merged_.out);
      lse += lines_.stride(merged_.lse);
    }
  }

 private:
  Work work() const {
    static constexpr char kernel = 0;
    return {"merge", &kernel, 0, bytes(), tasks_};
  }
  double bytes() const {
    const double elements = static_cast<double>(lines_.rows()) * static_cast<double>(columns_ + 1);
    return elements * static_cast<double>(size_of(merged_.out.dtype)) * static_cast<double>(parts_.size() + 1);
  }

  // Reads all parts before it writes, since one of them may be the output itself.
  void merge_run(std::span<const Source> sources, char* out, std::int64_t column, std::int64_t count) const {
    double sum[run] = {};
    for (std::size_t p = 0; p < sources.size(); ++p)
      if (sources[p].weight != 0) add_part(sum, parts_[p].out, sources[p], column, count);
    const TensorView& to = merged_.out;
    const TargetRow row{out + column * to.stride(0), to.stride(0), to.dtype};
    if (to.dtype == DType::f64) return scatter_row(kernels_, row, reinterpret_cast<char*>(sum), to.dtype, count);
    float rounded[run];
    for (std::int64_t i = 0; i < count; ++i) rounded[i] = static_cast<float>(sum[i]);
    scatter_row(kernels_, row, reinterpret_cast<char*>(rounded), DType::f32, count);
  }

  void add_part(double* sum, const TensorView& part, const Source& source, std::int64_t column,
                std::int64_t count) const {
    const DType type = computed_in(part.dtype);
    const char* from = source.out + column * part.stride(0);
    alignas(64) char gathered[run * sizeof(double)];
    if (type != part.dtype || part.stride(0) != size_of(type)) {
      gather_rows(kernels_, gathered, type, {{from, 0, part.stride(0)}, part.dtype}, 1, count);
      from = gathered;
    }
    with_type(type, [&]<class T> { add_weighted<T>(sum, from, count, source.weight); });
  }

  const KernelSet& kernels_;
  const std::span<const State> parts_;
  const State& merged_;
  const Lines lines_;
  const std::int64_t columns_, block_, blocks_, tasks_;
  const int threads_;
  const ThreadScratch memory_;  // for the sources
};

}  // namespace

bool merge_states(const KernelSet& kernels, std::span<const State> parts, const State& merged, int num_threads,
                  Interrupted interrupted) {
  return Merge(kernels, parts, merged, num_threads).run_tasks(interrupted);
}

}  // namespace selfattn
