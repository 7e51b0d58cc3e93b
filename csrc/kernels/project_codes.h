// Linear projection with 8-bit codes as weights, for rows of x that are split into 8-bit digits. Products of digits and
// codes are integers, so their sums are exact.
#pragma once
#include "kernels/code_digits.h"
#include "kernels/element_type.h"
#include "kernels/project.h"

namespace selfattn::SELFATTN_ISA {

// A cell is four elements along the depth.
struct DigitCell {
  std::int32_t bytes;  // digits plus 128, unsigned
};
struct CodeCell {
  std::int32_t bytes;  // signed
};
inline Bytes broadcast(DigitCell x) { return broadcast_cell(x.bytes); }
inline Bytes load(const CodeCell* p) { return load_bytes(p); }

struct CodeUnit {
  using Real = std::int32_t;
  static constexpr int cell = digit_cell;
  static Integers add_product(Bytes digits, Bytes codes, Integers sum) { return add_products(digits, codes, sum); }
};

// All digits are 127.
template <int Digits>
constexpr int largest_integer = 127 * ((1 << 8 * Digits) - 1) / 255;

// Writes the digits of up to 16 integers, one row of digits after another. The highest digits come first.
template <int Digits>
inline void store_digits(Integers integers, std::int64_t count, std::uint8_t* to, std::int64_t stride) {
  for (int n = Digits - 1; n >= 0; --n) {
    alignas(16) std::uint8_t digits[Integers::width];
    const Integers shifted = integers + broadcast(128);
    store_lowest_bytes(digits, shifted);
    std::memcpy(to + n * stride, digits, static_cast<std::size_t>(count < Integers::width ? count : Integers::width));
    integers = divided_by_256(shifted);
  }
}

// After each row of digits: an integer is worth factor * 2^power. They are kept apart, since their product may be
// subnormal.
struct DigitScale {
  float factor;  // NaN: a number of the row is not finite
  float power;
};
constexpr int scale_cells = sizeof(DigitScale) / sizeof(DigitCell);
static_assert(scale_cells * digit_cell == digit_scale_bytes);

// Rounds a row of x to multiples of max|x| / largest_integer, and splits the multiples into digits.
template <int Digits>
inline void split_row(const float* x, std::int64_t depth, void* to) {
  constexpr int W = VecF::width;
  VecF size = broadcast(0.0f);
  MaskF finite = size == size;
  for (std::int64_t d = 0; d < depth; d += W) {
    const VecF a = abs(load_up_to(x + d, depth - d));
    finite = finite & (a <= broadcast(largest<float>));
    size = max(size, a);
  }
  // Numbers are divided by a power of two first: the divisor of subnormal numbers would overflow.
  const float power = static_cast<float>(power_above(reduce_max(size)));
  const VecF down = broadcast(-power);
  const float most = reduce_max(scale_by_power(size, down));
  const VecF factor = broadcast(most > 0 ? largest_integer<Digits> / most : 0);
  const std::int64_t stride = depth + digit_scale_bytes;
  std::uint8_t* digits = static_cast<std::uint8_t*>(to);
  for (std::int64_t d = 0; d < depth; d += W) {
    const VecF scaled = scale_by_power(load_up_to(x + d, depth - d), down);
    store_digits<Digits>(to_integers(scaled * factor), depth - d, digits + d, stride);
  }
  const DigitScale scale{all(finite) ? most / largest_integer<Digits> : __builtin_nanf(""), power};
  for (int n = 0; n < Digits; ++n) std::memcpy(digits + n * stride + depth, &scale, sizeof scale);
}

// A slice lies within one group of codes.
struct CodeSlice {
  DepthSlice slice;
  std::int64_t group;
};

// Adds the sums of one row of x and one panel to `out`. The panel's columns start at `column`.
template <int Digits, int Vectors>
inline void store_code_row(const ProjectArgs& args, const CodeSlice& part, std::int64_t row, std::int64_t column,
                           const Integers (*sums)[Vectors]) {
  const std::int64_t cells = args.depth / digit_cell;
  DigitScale scale;
  std::memcpy(&scale, static_cast<const DigitCell*>(args.x) + row * Digits * (cells + scale_cells) + cells,
              sizeof scale);
  for (int c = 0; c < Vectors && column < args.columns; ++c, column += VecF::width) {
    const Integers start = load_integers(args.starts + part.slice.index * args.scale_stride + column);
    VecF digits[Digits];
    for (int n = 0; n < Digits; ++n) digits[n] = to_floats(sums[n][c] + start);
    // The powers of two are applied last, at once: before that, nothing overflows or becomes subnormal.
    const VecF weight = load(args.scales + part.group * args.scale_stride + column);
    const VecF sum = join_digits(digits) * broadcast(scale.factor) * significand(weight);
    const VecF scaled = scale_by_power(sum, exponent(weight) + broadcast(scale.power));
    store_sum(args, part.slice, row, column, scaled);
  }
}

// Each row of digits is one row of the product.
template <int Digits, int TileRows, int Vectors>
inline void multiply_slice(const ProjectArgs& args, const CodeSlice& part, std::int64_t depth) {
  constexpr int width = Vectors * VecF::width, together = 4;
  const std::int64_t panel_stride = args.panel_stride / static_cast<std::int64_t>(sizeof(CodeCell));
  const RowMajor<DigitCell> x{static_cast<const DigitCell*>(args.x) + part.slice.first,
                              args.depth / digit_cell + scale_cells};
  const CodeCell* panel = static_cast<const CodeCell*>(args.panel) + part.slice.first * width;
  std::int64_t column = 0;
  if (args.rows == 1)
    for (; column + (together - 1) * width < args.columns;
         column += together * width, panel += together * panel_stride) {
      Integers sums[together][Digits][Vectors];
      multiply_row<CodeUnit>(x, panel, panel_stride, depth, sums);
      for (int p = 0; p < together; ++p) store_code_row<Digits>(args, part, 0, column + p * width, sums[p]);
    }
  for (; column < args.columns; column += width, panel += panel_stride)
    multiply_rows<TileRows, Vectors, CodeUnit>(
        x, args.rows * Digits, RightOperand<CodeCell>{panel, width, depth}, [&](std::int64_t first, const auto& sums) {
          constexpr int rows = static_cast<int>(sizeof(sums) / sizeof(sums[0]));
          for (int r = 0; r + Digits <= rows; r += Digits)
            store_code_row<Digits>(args, part, (first + r) / Digits, column, sums + r);
        });
}

template <int Digits, int TileRows, int Vectors>
inline void project_codes(const ProjectArgs& args) {
  const std::int64_t all = args.depth / digit_cell, group = all / args.groups;
  CodeSlice part{{0, 0, false}, 0};
  for (; part.group < args.groups; ++part.group)
    for (std::int64_t left = group; left > 0; ++part.slice.index) {
      const std::int64_t most = code_slice / digit_cell, depth = left < most ? left : most;
      left -= depth;
      part.slice.last = part.slice.first + depth == all;
      multiply_slice<Digits, TileRows, Vectors>(args, part, depth);
      part.slice.first += depth;
    }
}

}  // namespace selfattn::SELFATTN_ISA
