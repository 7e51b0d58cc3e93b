#include "kernel_set_checks.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "guarded_memory.h"

namespace selfattn::test {
namespace {

template <class T>
std::vector<T> numbers(std::size_t count) {
  std::mt19937 random(7);
  std::uniform_real_distribution<T> distribution(-2, 2);
  std::vector<T> values(count);
  for (T& value : values) value = distribution(random);
  return values;
}

// Every sum is bit-identical to one chain of FMAs; memory between the rows of the output is unchanged.
template <class T>
void check_project(const TypeKernels& kernels, DType dtype, bool fuses, int rows, int columns, bool with_bias) {
  constexpr int depth = 13, gap = 3;
  constexpr T untouched = -77;
  const int panel_columns = kernels.panel_columns;
  const auto x = numbers<T>(static_cast<std::size_t>(rows * depth));
  const auto panel = numbers<T>(static_cast<std::size_t>(depth * panel_columns));
  const auto bias = numbers<T>(static_cast<std::size_t>(panel_columns));
  const int out_step = columns + gap;
  std::vector<T> out(static_cast<std::size_t>(rows * out_step), untouched);
  kernels.of(dtype).project(
      {x.data(), depth, rows, depth, panel.data(), with_bias ? bias.data() : nullptr, out.data(), out_step, columns});
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < out_step; ++n) {
      T sum = 0;
      for (int k = 0; k < depth && n < columns; ++k) {
        const T a = x[static_cast<std::size_t>(i * depth + k)],
                b = panel[static_cast<std::size_t>(k * panel_columns + n)];
        sum = fuses ? std::fma(a, b, sum) : a * b + sum;
      }
      if (with_bias && n < columns) sum += bias[static_cast<std::size_t>(n)];
      expect_same(out[static_cast<std::size_t>(i * out_step + n)], n < columns ? sum : untouched, "project");
    }
}

template <class T>
void check_weigh(const TypeKernels& kernels) {
  for (std::size_t count = 0; count < 40; ++count) {
    auto scores = numbers<T>(count + 1);
    for (T& score : scores) score = 10 * score - 25;
    scores.back() = -77;
    const auto before = scores;
    kernels.weigh(scores.data(), static_cast<std::int64_t>(count), 1.5, 0.25);
    expect_same(scores.back(), -77, "weigh beyond its end");
    for (std::size_t i = 0; i < count; ++i) {
      const double exact = std::exp2(static_cast<double>(before[i]) - 1.5) * 0.25;
      // Rounding t = score - 1.5 alone is worth |t| ln 2 units.
      const double units = 5 + std::abs(static_cast<double>(before[i]) - 1.5);
      SELFATTN_CHECK(std::abs(scores[i] - exact) <= units * std::numeric_limits<T>::epsilon() * exact);
    }
  }
}

template <class T>
void check_type(const TypeKernels& kernels, DType dtype, bool fuses) {
  SELFATTN_CHECK(kernels.tile.strip_rows > 1 && kernels.of(dtype).row->strip_rows == 1);
  for (const int rows : {1, 2, 7, 8, 19})
    for (const int columns : {1, kernels.panel_columns / 2, kernels.panel_columns - 1, kernels.panel_columns})
      for (const bool with_bias : {false, true}) check_project<T>(kernels, dtype, fuses, rows, columns, with_bias);
  check_weigh<T>(kernels);
  SELFATTN_CHECK(kernels.peak_loop(10) >= 2 * 10);
}

// A type of numbers has what drivers call without a check, exactly in the table of the type in which it is computed.
void check_table(const TypeKernels& kernels, DType computed) {
  for (int i = 0; i < dtype_count; ++i) {
    const auto dtype = static_cast<DType>(i);
    const StoredKernels& stored = kernels.of(dtype);
    const bool here = computed_in(dtype) == computed;
    SELFATTN_CHECK((stored.row != nullptr) == here && (!here || stored.row->keys == dtype));
    SELFATTN_CHECK((stored.project != nullptr) == (here && !is_scaled(dtype)));
    SELFATTN_CHECK((stored.widen != nullptr) == (here && dtype != computed));
    SELFATTN_CHECK((stored.narrow != nullptr) == (here && is_narrow(dtype)));
  }
}

// Whole rows of any length, between memory that must not change.
void check_conversion(const StoredKernels& stored, std::uint16_t one) {
  constexpr std::size_t most = 70;
  for (std::size_t count = 0; count < most; ++count) {
    GuardedMemory from(count * sizeof one), to(count * sizeof(float)), back(count * sizeof one);
    auto* const narrow = reinterpret_cast<std::uint16_t*>(from.data());
    auto* const wide = reinterpret_cast<float*>(to.data());
    auto* const again = reinterpret_cast<std::uint16_t*>(back.data());
    // 1 and what follows it: every lane another number
    for (std::size_t i = 0; i < count; ++i) narrow[i] = static_cast<std::uint16_t>(one + i);
    stored.widen(narrow, static_cast<std::int64_t>(count), wide);
    stored.narrow(wide, static_cast<std::int64_t>(count), again);
    for (std::size_t i = 0; i < count; ++i) {
      const double step = one == 0x3c00 ? 0x1p-10 : 0x1p-7;
      expect_same(wide[i], 1 + static_cast<double>(i) * step, "widen a row");
      expect_same(again[i], narrow[i], "narrow a row");
    }
  }
}

}  // namespace

void check_kernel_set(const KernelSet& kernels) {
  begin_section(kernels.name);
  const bool fuses = std::strcmp(kernels.name, "portable") != 0;
  check_type<float>(kernels.f32, DType::f32, fuses);
  check_type<double>(kernels.f64, DType::f64, fuses);
  check_table(kernels.f32, DType::f32);
  check_table(kernels.f64, DType::f64);
  check_conversion(kernels.f32.of(DType::f16), 0x3c00);
  check_conversion(kernels.f32.of(DType::bf16), 0x3f80);
}

}  // namespace selfattn::test
