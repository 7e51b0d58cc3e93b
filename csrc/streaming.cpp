#include "streaming.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "attend.h"
#include "carver.h"
#include "message.h"
#include "operand.h"
#include "row_block.h"
#include "rows.h"

namespace selfattn {
namespace {

constexpr std::int64_t rows_per_task = 64;

// Divides memory into contiguous arrays for the sums of a problem's rows, and places these arrays. Returns their size
// in bytes. If `base` is null, only the size is of use.
std::size_t place_sums(Problem& problem, char* base) {
  Carver carver{base};
  const auto next = [&](const Shape& shape, DType dtype, Operand (*place)(Problem&, const TensorView&)) {
    std::int64_t strides[max_axes], bytes = size_of(dtype);
    for (int axis = shape.ndim - 1; axis >= 0; --axis) {
      strides[axis] = bytes;
      bytes *= shape.extent[axis];  // make_problem has limited the size of the results
    }
    return place(problem, {carver.take<char>(bytes), dtype, shape.ndim, shape.extent, strides});
  };
  problem.out = next(out_shape(problem), problem.dtype, place_rows);
  problem.running.row_max = next(lse_shape(problem), problem.dtype, place_per_row);
  problem.running.row_sum = next(lse_shape(problem), problem.dtype, place_per_row);
  problem.running.sees_key = next(lse_shape(problem), DType::boolean, place_per_row);
  return carver.used;
}

void check_keys(const AttentionArguments& a, std::int64_t next) {
  const auto [first, kv_len] = *a.piece;
  const std::int64_t count = a.k.ndim < 2 ? 0 : trailing_axes(a.k, a.layout).length;
  if (first != next)
    refuse(a.function, "first"_arg, " is ", first, ", but key ", next,
           " comes next: pieces come in order, without gaps");
  if (count > kv_len - first)
    refuse(a.function, "k"_arg, " has ", count, " keys from key ", first, " on, but ", "kv_len"_arg, " is ", kv_len);
}

// The number of rows must not depend on the piece. So the leading dimensions of k and v must not broadcast q.
void check_shapes(const Problem& problem, const AttentionArguments& a) {
  const Shape whole = rows_shape(problem, problem.num_heads, problem.q_len, problem.head_dim);
  if (a.q.ndim != whole.ndim || !std::equal(whole.extent, whole.extent + whole.ndim, a.q.shape))
    refuse(a.function, "q"_arg, " has shape ", shape_text(a.q), ", which the leading dimensions of ", "k"_arg, " and ",
           "v"_arg, " would broadcast to ", to_text(whole.extent, whole.ndim), ": pass q in that shape");
}

// A later piece must agree with the pieces before, because it continues their sums.
void check_later(const Problem& problem, const Problem& earlier, const AttentionArguments& a) {
  if (problem.num_kv_heads != earlier.num_kv_heads)
    refuse(a.function, "k"_arg, " has ", problem.num_kv_heads, " heads, but the pieces before had ",
           earlier.num_kv_heads);
  if (problem.value_dim != earlier.value_dim)
    refuse(a.function, "v"_arg, " has head_dim ", problem.value_dim, ", but the pieces before had ", earlier.value_dim);
  if (a.k.dtype != earlier.key.dtype)
    refuse<TypeRefusal>(a.function, "k"_arg, " has dtype ", name_of(a.k.dtype), ", but the pieces before had ",
                        name_of(earlier.key.dtype));
}

class Finish {
 public:
  Finish(const Problem& sums, const Problem& results, const KernelSet& kernels, int num_threads,
         Interrupted interrupted)
      : sums_(sums),
        results_(results),
        kernels_(kernels),
        blocks_(ceil_div(results.q_len, rows_per_task)),
        tasks_(results.batch * results.num_heads * blocks_),
        row_bytes_(bytes_of(std::max<std::int64_t>(results.value_dim, 1), size_of(results.dtype))),
        threads_(useful_threads(work(), num_threads)),
        memory_(static_cast<std::size_t>(row_bytes_), threads_),
        loop_(work(), threads_, interrupted) {}

  bool execute() { return loop_.run(*this); }

  void operator()(std::int64_t task, int thread) const {
    const std::int64_t block = task % blocks_, head = task / blocks_ % results_.num_heads;
    const RowSpan span =
        make_span(results_, task / blocks_ / results_.num_heads, head, 1, block * rows_per_task, rows_per_task);
    const ValidKeys valid = valid_keys(results_, span.batch);
    char* row = memory_.of(thread);
    for (int i = 0; i < span.valid; ++i)
      with_type(results_.dtype, [&]<class T> { finish_row<T>(span, row_index(span, i), valid, row); });
    clear_rows(results_, span);
  }

 private:
  Work work() const {
    static constexpr char kernel = 0;
    return {"end of a stream", &kernel, 0, bytes(), tasks_};
  }
  double bytes() const {
    return 2 * static_cast<double>(results_.batch * results_.num_heads) * static_cast<double>(results_.q_len) *
           static_cast<double>(row_bytes_);
  }

  // The same operations as at the end of a call of attend.
  template <class T>
  void finish_row(const RowSpan& span, RowIndex index, const ValidKeys& valid, char* row) const {
    const Problem& from = sums_;
    const T max = number<T>(from.running.row_max, span, index), sum = number<T>(from.running.row_sum, span, index);
    const bool undefined = sum == T(0) && *element(from, from.running.sees_key, span, index) != 0;
    const T factor = undefined ? std::numeric_limits<T>::quiet_NaN() : T(1) / (sum == T(0) ? T(1) : sum);
    const T* out = reinterpret_cast<const T*>(element(from, from.out, span, index));
    const Operand& to = results_.out;
    const bool direct = to.in_place && to.dtype == results_.dtype;
    char* target = element(results_, to, span, index);
    T* finished = reinterpret_cast<T*>(direct ? target : row);
    std::transform(out, out + from.value_dim, finished, [factor](T x) { return x * factor; });
    if (!direct) scatter_row(kernels_, {target, to.column, to.dtype}, row, results_.dtype, results_.value_dim);
    const double omitted = results_.alibi_slopes ? describe_row(results_, span, index, valid).omitted : 0;
    write_real(element(results_, results_.lse, span, index),
               lse_of(static_cast<double>(max), static_cast<double>(sum), omitted), results_.lse.dtype);
  }

  template <class T>
  T number(const Operand& operand, const RowSpan& span, RowIndex index) const {
    return *reinterpret_cast<const T*>(element(sums_, operand, span, index));
  }

  const Problem &sums_, &results_;
  const KernelSet& kernels_;
  const std::int64_t blocks_, tasks_, row_bytes_;
  const int threads_;
  const ThreadScratch memory_;  // a row
  TaskLoop loop_;
};

}  // namespace

void AttentionState::check(const char* function) const {
  if (!complete_)
    throw std::runtime_error(std::string(function) +
                             ": an absorb was interrupted, so that only some rows have absorbed its keys: start again "
                             "with a new AttentionState");
}

const Problem& AttentionState::results(const char* function) const {
  if (!begun_) refuse(function, "nothing was absorbed yet, so the width of ", "v"_arg, " is unknown (n may be 0)");
  return last_;
}

Problem AttentionState::problem_of(AttentionArguments arguments, std::int64_t first) {
  arguments.piece = Piece{first, kv_len_};
  check_keys(arguments, next_);
  Problem problem = make_problem(arguments);
  check_shapes(problem, arguments);
  if (begun_)
    check_later(problem, last_, arguments);
  else
    memory_.emplace(std::max<std::size_t>(place_sums(problem, nullptr), 1));
  place_sums(problem, memory_->data());
  problem.running.begun = begun_;
  return problem;
}

bool AttentionState::absorb(const Problem& problem, const Plan& plan, int threads, Interrupted interrupted) {
  Problem last = problem;
  last.mask = last.bias = {};
  complete_ = false;  // also in a process that is forked meanwhile
  try {
    complete_ = attend(problem, plan, threads, interrupted);
  } catch (...) {  // no memory: nothing has been written
    complete_ = true;
    throw;
  }
  begun_ = true;
  next_ = problem.held.end;
  last_ = std::move(last);
  return complete_;
}

bool AttentionState::finish(const Problem& results, const KernelSet& kernels, int num_threads,
                            Interrupted interrupted) const {
  return Finish(last_, results, kernels, num_threads, interrupted).execute();
}

}  // namespace selfattn
