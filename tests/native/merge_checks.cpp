#include "merge_checks.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "guarded_memory.h"
#include "merge.h"
#include "rows.h"

namespace selfattn::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// Rows of results and their log-sum-exps, each in guarded memory.
class GuardedState {
 public:
  GuardedState(DType type, std::int64_t rows, std::int64_t columns)
      : size_(size_of(type)),
        lse_size_(size_of(computed_in(type))),
        shape_{rows, columns},
        strides_{columns * size_, size_},
        out_(static_cast<std::size_t>(rows * columns * size_)),
        lse_(static_cast<std::size_t>(rows * lse_size_)),
        state{{out_.data(), type, 2, shape_, strides_}, {lse_.data(), computed_in(type), 1, shape_, &lse_size_}} {}
  GuardedState(const GuardedState&) = delete;
  GuardedState& operator=(const GuardedState&) = delete;

  void fill(std::int64_t row, double lse, double value) {
    write_real(lse_.data() + row * lse_size_, lse, state.lse.dtype);
    for (std::int64_t i = 0; i < shape_[1]; ++i)
      write_real(out_.data() + row * strides_[0] + i * size_, value, state.out.dtype);
  }
  void expect_row(std::int64_t row, double lse, double value) const {
    const double got = read_real(lse_.data() + row * lse_size_, state.lse.dtype);
    SELFATTN_CHECK(got == lse || std::abs(got - lse) < 1e-6);
    for (std::int64_t i = 0; i < shape_[1]; ++i)
      expect_same(read_real(out_.data() + row * strides_[0] + i * size_, state.out.dtype), value, "merged");
  }

 private:
  const std::int64_t size_, lse_size_, shape_[2], strides_[2];
  const GuardedMemory out_, lse_;

 public:
  const State state;
};

void check_rows(const KernelSet& kernels, DType type, std::int64_t rows, std::int64_t columns, int threads) {
  GuardedState first(type, rows, columns), second(type, rows, columns), merged(type, rows, columns);
  for (std::int64_t row = 0; row < rows; ++row) {
    const bool hidden = row % 3 == 1;
    first.fill(row, 2, static_cast<double>(row % 5));
    second.fill(row, hidden ? -infinity : 2, hidden ? not_a_number : 3);
  }
  const State parts[] = {first.state, second.state};
  SELFATTN_CHECK(merge_states(kernels, parts, merged.state, threads, nullptr));
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto value = static_cast<double>(row % 5);
    if (row % 3 == 1)
      merged.expect_row(row, 2, value);
    else
      merged.expect_row(row, 2 + ln_2, (value + 3) / 2);
  }
}

}  // namespace

void check_merge(const KernelSet& kernels) {
  begin_section("merge");
  for (const DType type : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
    for (const std::int64_t columns : {0, 1, 7, 255, 256, 300})
      for (const std::int64_t rows : {0, 1, 5}) check_rows(kernels, type, rows, columns, 1);
    check_rows(kernels, type, 1001, 129, 3);
  }
}

}  // namespace selfattn::test
