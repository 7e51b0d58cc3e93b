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
  const int out_stride = columns + gap;
  std::vector<T> out(static_cast<std::size_t>(rows * out_stride), untouched);
  kernels.of(dtype).project(
      {x.data(), depth, rows, depth, panel.data(), with_bias ? bias.data() : nullptr, out.data(), out_stride, columns});
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < out_stride; ++n) {
      T sum = 0;
      for (int k = 0; k < depth && n < columns; ++k) {
        const T a = x[static_cast<std::size_t>(i * depth + k)],
                b = panel[static_cast<std::size_t>(k * panel_columns + n)];
        sum = fuses ? std::fma(a, b, sum) : a * b + sum;
      }
      if (with_bias && n < columns) sum += bias[static_cast<std::size_t>(n)];
      expect_same(out[static_cast<std::size_t>(i * out_stride + n)], n < columns ? sum : untouched, "project");
    }
}

// Several panels in one call give the same bits as one call for each panel.
template <class T>
void check_panels(const TypeKernels& kernels, DType dtype, int rows) {
  constexpr int depth = 5, panels = 6;
  const int width = kernels.panel_columns, columns = panels * width - 1;
  const auto x = numbers<T>(static_cast<std::size_t>(rows * depth));
  const auto weights = numbers<T>(static_cast<std::size_t>(panels * depth * width));
  const auto bias = numbers<T>(static_cast<std::size_t>(panels * width));
  std::vector<T> together(static_cast<std::size_t>(rows * (columns + 1)), T(-77)), alone = together;
  const std::int64_t panel = std::int64_t{depth} * width;
  const auto project = kernels.of(dtype).project;
  project({x.data(), depth, rows, depth, weights.data(), bias.data(), together.data(), columns + 1, columns,
           panel * static_cast<std::int64_t>(sizeof(T))});
  for (int p = 0; p < panels; ++p)
    project({x.data(), depth, rows, depth, weights.data() + p * panel, bias.data() + p * width,
             alone.data() + p * width, columns + 1, p + 1 < panels ? width : width - 1});
  for (std::size_t i = 0; i < alone.size(); ++i) expect_same(together[i], alone[i], "several panels");
}

double activated(Activation activation, double x) {
  const double pi = std::acos(-1.0);
  switch (activation) {
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::gelu:
      return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case Activation::gelu_tanh:
      return x / (1 + std::exp(-2 * std::sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

template <class T>
void check_finish(const TypeKernels& kernels, DType dtype, Activation activation, bool gated, bool added) {
  constexpr int rows = 3;
  for (int columns = 1; columns < 2 * kernels.lanes + 3; ++columns) {
    const int stride = columns + 2;
    const auto count = static_cast<std::size_t>(rows * stride);
    auto sums = numbers<T>(count), gates = numbers<T>(count);
    for (T& gate : gates) gate = 3 * gate + 1;
    const auto product = sums, gate = gates, residual = numbers<T>(count);
    std::vector<T> out(count, T(-77));
    kernels.of(dtype).finish({activation, sums.data(), gated ? gates.data() : nullptr, stride,
                              added ? residual.data() : nullptr, stride, out.data(), stride, rows, columns});
    for (std::size_t i = 0; i < count; ++i) {
      if (static_cast<int>(i) % stride >= columns) {
        expect_same(out[i], T(-77), "finish beyond a row's end");
        continue;
      }
      const double value = activated(activation, static_cast<double>(gated ? gate[i] : product[i]));
      const double exact =
          (gated ? value * static_cast<double>(product[i]) : value) + (added ? static_cast<double>(residual[i]) : 0);
      SELFATTN_CHECK(std::abs(out[i] - exact) <= 8 * std::numeric_limits<T>::epsilon() * (std::abs(value) + 2));
    }
  }
}

template <class T>
void check_normalise(const TypeKernels& kernels, bool centred, bool all) {
  for (std::size_t count = 1; count < 9 * static_cast<std::size_t>(kernels.lanes); count += count < 20 ? 1 : 7) {
    auto row = numbers<T>(count + 1);
    row.back() = -77;
    const auto x = row, addend = numbers<T>(count), weight = numbers<T>(count), bias = numbers<T>(count);
    kernels.normalise({row.data(), all ? addend.data() : nullptr, all ? weight.data() : nullptr,
                       all ? bias.data() : nullptr, static_cast<std::int64_t>(count), 0.5, centred});
    expect_same(row.back(), T(-77), "normalise beyond the end");
    double mean = 0, square = 0;
    const auto z = [&](std::size_t i) {
      return static_cast<double>(x[i]) + (all ? static_cast<double>(addend[i]) : 0);
    };
    for (std::size_t i = 0; i < count && centred; ++i) mean += z(i) / static_cast<double>(count);
    for (std::size_t i = 0; i < count; ++i) square += (z(i) - mean) * (z(i) - mean) / static_cast<double>(count);
    for (std::size_t i = 0; i < count; ++i) {
      const double scaled = (z(i) - mean) / std::sqrt(square + 0.5) * (all ? static_cast<double>(weight[i]) : 1);
      const double exact = scaled + (all ? static_cast<double>(bias[i]) : 0);
      SELFATTN_CHECK(std::abs(row[i] - exact) <= 32 * std::numeric_limits<T>::epsilon());
    }
  }
}

template <class T>
void check_layers(const TypeKernels& kernels, DType dtype) {
  for (const int rows : {1, 2, 9}) check_panels<T>(kernels, dtype, rows);
  for (const auto activation :
       {Activation::none, Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu})
    for (const bool gated : {false, true})
      for (const bool added : {false, true}) check_finish<T>(kernels, dtype, activation, gated, added);
  for (const bool centred : {false, true})
    for (const bool all : {false, true}) check_normalise<T>(kernels, centred, all);
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
      // Rounding t = score - 1.5 alone may change the result by |t| ln 2 / 2 epsilons.
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
  check_layers<T>(kernels, dtype);
  check_weigh<T>(kernels);
  SELFATTN_CHECK(kernels.peak_loop(10) >= 2 * 10);
}

// An element type has its kernels in the table of the type in which it is computed, and in no other table. Drivers call
// them without checking for null.
void check_table(const TypeKernels& kernels, DType computed) {
  for (int i = 0; i < dtype_count; ++i) {
    const auto dtype = static_cast<DType>(i);
    const StoredKernels& stored = kernels.of(dtype);
    const bool here = computed_in(dtype) == computed;
    const bool steps = here && !shares_words(dtype);
    SELFATTN_CHECK((stored.row != nullptr) == steps && (!steps || stored.row->keys == dtype));
    SELFATTN_CHECK((stored.project != nullptr) == steps);
    SELFATTN_CHECK((stored.unpack != nullptr) == (here && !steps));
    SELFATTN_CHECK((stored.widen != nullptr) == (here && dtype != computed));
    SELFATTN_CHECK((stored.finish != nullptr) == (here && !is_scaled(dtype)));
    SELFATTN_CHECK((stored.narrow != nullptr) == (here && is_narrow(dtype)));
  }
}

// Converts rows of any length that end at inaccessible memory.
void check_conversion(const StoredKernels& stored, std::uint16_t one) {
  constexpr std::size_t most = 70;
  for (std::size_t count = 0; count < most; ++count) {
    GuardedMemory from(count * sizeof one), to(count * sizeof(float)), back(count * sizeof one);
    auto* const narrow = reinterpret_cast<std::uint16_t*>(from.data());
    auto* const wide = reinterpret_cast<float*>(to.data());
    auto* const again = reinterpret_cast<std::uint16_t*>(back.data());
    // 1 and the bit patterns that follow it, so that every lane has a different number
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
