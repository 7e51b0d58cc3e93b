// The row kernel's products for 8-bit codes, with AVX512_VNNI. The numbers of a query are rounded to integer multiples
// of one power of two. The power is chosen so that the largest of these integers, with its sign, fits in 24 bits.
#pragma once
#include "kernels/code_values.h"
#include "kernels/row_products.h"

namespace selfattn::SELFATTN_ISA {

struct CodeDots : FmaDots<float, Int8> {
  static constexpr const char* unit = "int8 dots";
};

// The products of `Rows` queries and some keys, digit by digit. A vector of sums belongs to a group of four keys. Each
// quarter of the vector has one sum for each of these keys. The four quarters sum over different dims.
template <int Rows>
struct CodeSums {
  static constexpr int Groups = 8 / Rows;  // of four keys: their sums fit in the registers
  static constexpr int keys_at_once = 4;
  static constexpr int keys = Groups * keys_at_once;
  Integers sums[Rows][code_digits][Groups];

  static constexpr int digit_bytes = code_digits * Bytes::width;

  // Loads the initial values of the sums. `digits`: the vectors of the first query (see CodeProducts::Memory).
  [[gnu::always_inline]] void start(const std::int8_t* digits, std::int64_t digit_stride) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < code_digits; ++n)
#pragma GCC unroll 8
        for (int g = 0; g < Groups; ++g) sums[r][n][g] = load_integers(digits + r * digit_stride + n * Bytes::width);
  }

  // Multiplies the first eight (Half = 0) or the last eight (Half = 1) codes of each quarter.
  template <int Half, class Load>
  [[gnu::always_inline]] void add_half(const std::int8_t* digits, std::int64_t digit_stride, Load load_codes) {
    Bytes codes[Groups][2];
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) {
      Bytes rows[keys_at_once];
#pragma GCC unroll 4
      for (int i = 0; i < keys_at_once; ++i) rows[i] = load_codes(g * keys_at_once + i);
      transpose_cells<Half>(rows, codes[g]);
      codes[g][0] = plus_128(codes[g][0]);
      codes[g][1] = plus_128(codes[g][1]);
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < code_digits; ++n) {
          const std::int64_t cell = r * digit_stride + (2 * Half + c) * digit_bytes + n * Bytes::width;
          const Bytes digit = in_register(load_bytes(digits + cell));
#pragma GCC unroll 8
          for (int g = 0; g < Groups; ++g) sums[r][n][g] = add_products(codes[g][c], digit, sums[r][n][g]);
        }
  }

  // The sums of four groups of keys from `First` on. If Rows is 4, these are all groups of two rows. If Rows is 2, they
  // are all groups of one row. If Rows is 1, they are half of the row's groups.
  template <int First>
  [[gnu::always_inline]] VecF joined() const {
    VecF digit[code_digits];
    const auto sum = [&](int n, int i) { return sums[(First + i) / Groups][n][(First + i) % Groups]; };
#pragma GCC unroll 4
    for (int n = 0; n < code_digits; ++n)
      digit[n] = to_floats(reduce_quarters(sum(n, 0), sum(n, 1), sum(n, 2), sum(n, 3)));
    return join_digits(digit);
  }
};

struct CodeProducts : RowProducts<float, 16, Int8, CodeDots> {
  using Base = RowProducts<float, 16, Int8, CodeDots>;
  using Values = CodeValues;
  static constexpr int digit_bytes = CodeSums<1>::digit_bytes;
  static constexpr int cells = 4;                // in a quarter of a vector
  static constexpr std::int64_t widest = 32768;  // the integer sums of more products of codes could overflow

  // Each number of a query is integer * 2^power. `digits` starts, for each query, with one vector per digit, which
  // holds the initial values of the sums. The digits of the query follow, 64 dims at a time. Of each digit, 64 dims
  // have 64 bytes: four quarters of four cells. For each i from 0 to 3, there is one vector per digit. In each quarter
  // of this vector, all four cells are copies of cell i of the same quarter of the digits, as `add_products` needs it.
  struct Memory : Base::Memory {
    std::int64_t digit_stride;
    std::int8_t* digits;
    float* power;  // NaN: the query is not finite

    Memory(void* base, int rows, int key_block, std::int64_t head_dim, std::int64_t value_dim)
        : Base::Memory(base, rows, key_block, head_dim, value_dim),
          digit_stride((1 + cells * ceil_div(head_dim, Bytes::width)) * digit_bytes) {
      Carver carver{static_cast<char*>(base), bytes};
      out_stride = round_up(value_dim, Bytes::width);
      out = carver.take<float>(rows * out_stride);
      digits = carver.take<std::int8_t>(rows * digit_stride);
      power = carver.take<float>(rows);
      bytes = carver.used;
    }
    explicit Memory(const RowBlock& block)
        : Memory(block.scratch, block.count, block.key_block, block.head_dim, block.value_dim) {}
  };

  // Rounds a query, and splits it into digits from -128 to 127.
  static void prepare(const RowBlock& block, const Memory& s, int row) {
    const float* query = s.queries + row * s.query_stride;
    VecF size = broadcast(0.0f);
    Mask<float> finite = size == size;
    for (std::int64_t d = 0; d < block.head_dim; d += W) {
      const VecF x = abs(load(query + d));
      finite = finite & (x <= broadcast(largest<float>));
      size = max(size, x);
    }
    // The largest number with three such digits is 127 * 65536 + 127 * 256 + 127, which is 2^23 divided by 1.004.
    const int power = power_above(reduce_max(size) * (1 + 0x1p-7f)) - 23;
    s.power[row] = all(finite) ? static_cast<float>(power) : __builtin_nanf("");
    std::int8_t* first = s.digits + row * s.digit_stride;
    Integers totals[code_digits] = {broadcast(0), broadcast(0), broadcast(0)};
    for (std::int64_t d = 0; d < block.head_dim; d += Bytes::width)
      split(query + d, block.head_dim - d, power, first + digit_bytes + d / Bytes::width * cells * digit_bytes, totals);
    // The unit multiplies code + 128, so sums start from -128 times the sum of the digits.
    for (int n = 0; n < code_digits; ++n)
      store_in_first_quarter(first + n * Bytes::width, -128 * reduce_sum(totals[n]));
  }

  // scores = q . k * multiplier
  static void score(const RowBlock& block, const Memory& s, const KeyBlock& keys) {
    for (int first = 0; first < keys.count; first += bunch_keys)
      if (block.head_dim % Bytes::width == 0)
        dot_rows<max_rows_at_once, true>(block, s, keys, first, 0);
      else
        dot_rows<max_rows_at_once, false>(block, s, keys, first, 0);
    const VecF multiplier = broadcast(static_cast<float>(block.scoring.multiplier));
    for (int r = 0; r < block.count; ++r) {
      float* scores = s.scores + r * s.score_stride;
      const VecF power = broadcast(s.power[r]);
      for (int j = 0; j < keys.count; j += W) store(scores + j, scale_by_power(load(scores + j), power) * multiplier);
      if (s.power[r] != s.power[r]) recompute(block, s, keys, r);
    }
  }

  static VecF load_out(const Memory& s, int row, std::int64_t dim) { return Values::load_out(s, row, dim); }
  static void store_out(const Memory& s, int row, std::int64_t dim, VecF sums) { Values::store_out(s, row, dim, sums); }

 private:
  // Splits up to 64 numbers.
  static void split(const float* numbers, std::int64_t count, int power, std::int8_t* to,
                    Integers (&totals)[code_digits]) {
    alignas(64) std::int8_t digits[code_digits][Bytes::width] = {};
    for (int i = 0; i < Bytes::width && i < count; i += W) {
      Integers rest = in_multiples(load(numbers + i), power);
      for (int n = code_digits - 1; n >= 0; --n) {
        store_lowest_bytes(digits[n] + i, rest);
        totals[n] = totals[n] + lowest_bytes(rest);
        rest = divided_by_256(rest + broadcast(128));
      }
    }
    for (int n = 0; n < code_digits; ++n, to += Bytes::width) {
      const Bytes digit = load_bytes(digits[n]);
      store_bytes(to, repeat_cell<0>(digit));
      store_bytes(to + digit_bytes, repeat_cell<1>(digit));
      store_bytes(to + 2 * digit_bytes, repeat_cell<2>(digit));
      store_bytes(to + 3 * digit_bytes, repeat_cell<3>(digit));
    }
  }

  // Computes the products of a bunch's keys. Whole: rows of keys are whole vectors of bytes.
  template <int Rows, bool Whole>
  static void dot_rows(const RowBlock& block, const Memory& s, const KeyBlock& keys, int first, int row) {
    constexpr int stride = CodeSums<Rows>::keys;
    const int last = keys.count - first < bunch_keys ? keys.count : first + bunch_keys;
    for (; row + Rows <= block.count; row += Rows)
      for (int j = first; j < last; j += stride) {
        const void* repeated[stride + rows_ahead];
        const void* const* rows = keys.key_rows + j;
        if (const int left = keys.count - j; left < stride) {  // beyond the end, the last key is read again
          for (int i = 0; i < stride + rows_ahead; ++i) repeated[i] = rows[i < left ? i : left - 1];
          rows = repeated;
        }
        dot_keys<Rows, Whole>(block, s, rows, row, j);
      }
    if constexpr (Rows > 1)
      if (row < block.count) dot_rows<Rows / 2, Whole>(block, s, keys, first, row);
  }

  template <int Rows, bool Whole>
  [[gnu::noinline]] static void dot_keys(const RowBlock& block, const Memory& s, const void* const* rows, int row,
                                         int first) {
    using Sums = CodeSums<Rows>;
    const std::int64_t digit_stride = s.digit_stride, head_dim = block.head_dim;
    const std::int8_t* digits = s.digits + row * digit_stride;
    Sums sums;
    sums.start(digits, digit_stride);
    digits += digit_bytes;
    for (std::int64_t d = 0; d < head_dim; d += Bytes::width, digits += cells * digit_bytes) {
      if (row == 0)
        for (int i = 0; i < Sums::keys; ++i) fetch_line(row_of<Int8>(rows, i + rows_ahead) + d);
      const auto load_codes = [&](int i) {
        const Int8* codes = row_of<Int8>(rows, i) + d;
        return Whole || head_dim - d >= Bytes::width ? load_bytes(codes) : load_bytes(codes, head_dim - d);
      };
      sums.template add_half<0>(digits, digit_stride, load_codes);
      sums.template add_half<1>(digits, digit_stride, load_codes);
    }
    float* scores = s.scores + row * s.score_stride + first;
    if constexpr (Rows == 4) {
      store_halves(scores, scores + s.score_stride, sums.template joined<0>());
      store_halves(scores + 2 * s.score_stride, scores + 3 * s.score_stride, sums.template joined<4>());
    } else {
      store(scores, sums.template joined<0>());
      if (Rows == 2 || first + W < s.score_stride)
        store(scores + (Rows == 2 ? s.score_stride : W), sums.template joined<4>());
    }
  }

  // Computes a row's scores in float, so that a query that is not finite gives what IEEE 754 says.
  static void recompute(const RowBlock& block, const Memory& s, const KeyBlock& keys, int row) {
    const float* query = s.queries + row * s.query_stride;
    for (int j = 0; j < keys.count; ++j) {
      const Int8* codes = row_of<Int8>(keys.key_rows, j);
      float sum = 0;
      for (std::int64_t d = 0; d < block.head_dim; ++d) sum = __builtin_fmaf(query[d], widen(codes[d]), sum);
      s.scores[row * s.score_stride + j] = sum * static_cast<float>(block.scoring.multiplier);
    }
  }
};

}  // namespace selfattn::SELFATTN_ISA
