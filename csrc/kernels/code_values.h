// The row kernel's sums of values that are 8-bit codes, with AVX512_VNNI. A row's weights for a bunch of keys are
// rounded to integer multiples of one power of two. The power is chosen so that the largest of these integers has 24
// bits.
#pragma once
#include "kernels/code_digits.h"
#include "kernels/row_values.h"

namespace selfattn::SELFATTN_ISA {

// The values of up to 64 keys. The number of keys is rounded up to whole cells. The added keys have weight 0.
struct CodeBunch {
  static constexpr int most_keys = 64, cell_keys = 4;
  const void* const* values;
  int first_key;
  int count;
  bool followed;  // whether rows_ahead more values follow, which can be prefetched
  const void* repeated[most_keys];

  CodeBunch(const KeyBlock& keys, int first)
      : values(keys.value_rows + first),
        first_key(first),
        count(keys.count - first < most_keys ? keys.count - first : most_keys),
        followed(count % cell_keys == 0) {
    if (followed) return;
    const int there = count;
    count = round_up(count, cell_keys);
    for (int j = 0; j < count; ++j) repeated[j] = values[j < there ? j : there - 1];
    values = repeated;
  }
};

// The weights of some rows for the keys of a bunch.
template <int Rows>
struct CodeWeights {
  alignas(64) std::uint8_t digits[Rows][code_digits][CodeBunch::most_keys];
  float power[Rows];    // weight = integer * 2^power
  float rescale[Rows];  // the factor of earlier sums
  bool usual[Rows];     // false: some weight is negative or not finite, and all integers are 0

  template <class Memory>
  CodeWeights(const Memory& s, const CodeBunch& bunch, int row) {
    for (int r = 0; r < Rows; ++r) {
      rescale[r] = bunch.first_key == 0 ? s.rescale[row + r] : 1.0f;
      round(r, s.scores + (row + r) * s.score_stride + bunch.first_key, bunch.count);
    }
  }

 private:
  // `weights` are padded to whole vectors.
  void round(int r, const float* weights, int count) {
    constexpr int W = VecF::width;
    VecF peak = broadcast(0.0f);
    Mask<float> good = peak == peak;
    for (int j = 0; j < count; j += W) {
      const VecF weight = load(weights + j);
      good = good & (broadcast(0.0f) <= weight) & (weight <= broadcast(largest<float>));
      peak = max(peak, weight);
    }
    usual[r] = all(good);
    const int exponent = power_above(reduce_max(peak)) - 8 * code_digits;
    power[r] = static_cast<float>(exponent);
    for (int j = 0; j < count; j += W) {
      Integers rest = usual[r] ? in_multiples(load(weights + j), exponent) : broadcast(0);
      for (int n = code_digits - 1; n >= 0; --n, rest = divided_by_256(rest))
        store_lowest_bytes(digits[r][n] + j, rest);
    }
  }
};

struct CodeValues {
  static constexpr int W = VecF::width;
  static constexpr int max_rows_at_once = 4;

  // out = out * rescale + probs . values, one bunch of keys after another.
  template <class Memory>
  static void accumulate(const RowBlock& block, const Memory& s, const KeyBlock& keys) {
    for (int first = 0; first < keys.count; first += CodeBunch::most_keys)
      accumulate_rows<max_rows_at_once>(block, s, CodeBunch(keys, first), 0);
  }

  // The same as `accumulate`, but skips hidden keys, because their weights may not be finite.
  template <class Memory>
  static void accumulate_visible(const RowBlock& block, const Memory& s, const ScoreTile<float>& tile,
                                 const KeyBlock& keys) {
    change_scores(tile, [&](VecF weight, int r, int l) {
      return select(visible<AcrossKeys>(tile, r, l), weight, broadcast(0.0f));
    });
    accumulate(block, s, keys);
  }

  template <class Memory>
  static VecF load_out(const Memory& s, int row, std::int64_t dim) {
    float numbers[W];
    for (int i = 0; i < W; ++i) numbers[i] = s.out[row * s.out_stride + index_of(dim + i)];
    return load(numbers);
  }

  template <class Memory>
  static void store_out(const Memory& s, int row, std::int64_t dim, VecF sums) {
    float numbers[W];
    store(numbers, sums);
    for (int i = 0; i < W; ++i) s.out[row * s.out_stride + index_of(dim + i)] = numbers[i];
  }

 private:
  // Outputs are stored in the order in which registers hold the sums. 64 dims are four quarters of four cells. The
  // first cells of the four quarters come first, then the second cells, and so on.
  static constexpr std::int64_t index_of(std::int64_t dim) {
    const std::int64_t within = dim % Bytes::width, quarter = within / W, cell = within % W / 4;
    return dim - within + cell * W + quarter * 4 + dim % 4;
  }

  template <int Rows, class Memory>
  static void accumulate_rows(const RowBlock& block, const Memory& s, const CodeBunch& bunch, int row) {
    for (; row + Rows <= block.count; row += Rows) {
      const CodeWeights<Rows> weights(s, bunch, row);
      const bool asks = bunch.followed && row + Rows == block.count;  // the last rows prefetch the next bunch
      for (std::int64_t dim = 0; dim < block.value_dim; dim += Bytes::width) {
        const std::int64_t left = block.value_dim - dim;
        float* out = s.out + row * s.out_stride + dim;
        const auto sum_halves = [&](auto load_codes) {
          Sums<Rows, 0>(bunch, dim, weights, asks, load_codes).add_to(out, s.out_stride, weights);
          Sums<Rows, 1>(bunch, dim, weights, asks, load_codes).add_to(out, s.out_stride, weights);
        };
        if (left < Bytes::width)
          sum_halves([left](const Int8* p) { return load_bytes(p, left); });
        else
          sum_halves([](const Int8* p) { return load_bytes(p); });
      }
      for (int r = 0; r < Rows; ++r)
        if (!weights.usual[r]) add_floats(block, s, bunch, row + r);
    }
    if constexpr (Rows > 1)
      if (row < block.count) accumulate_rows<Rows / 2>(block, s, bunch, row);
  }

  // Sums for 32 of 64 dims: the first eight (Half = 0) or the last eight (Half = 1) of each quarter of 16 dims.
  template <int Rows, int Half>
  struct Sums {
    Integers sums[Rows][2][code_digits];

    template <class Load>
    [[gnu::always_inline]] Sums(const CodeBunch& bunch, std::int64_t dim, const CodeWeights<Rows>& weights, bool asks,
                                Load load_codes) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < code_digits; ++n) sums[r][0][n] = sums[r][1][n] = broadcast(0);
      for (int j = 0; j < bunch.count; j += CodeBunch::cell_keys) {
        const void* const* values = bunch.values + j;
        if (asks) {  // the other half prefetches the other two keys of the cell
          fetch_line(row_of<Int8>(values, rows_ahead + 2 * Half) + dim);
          fetch_line(row_of<Int8>(values, rows_ahead + 2 * Half + 1) + dim);
        }
        Bytes rows[CodeBunch::cell_keys], codes[2];
#pragma GCC unroll 4
        for (int i = 0; i < CodeBunch::cell_keys; ++i) rows[i] = load_codes(row_of<Int8>(values, i) + dim);
        transpose_bytes<Half>(rows, codes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < code_digits; ++n) {
            const Bytes digit = in_register(broadcast_cell(weights.digits[r][n] + j));
            sums[r][0][n] = add_products(digit, codes[0], sums[r][0][n]);
            sums[r][1][n] = add_products(digit, codes[1], sums[r][1][n]);
          }
      }
    }

    [[gnu::always_inline]] void add_to(float* out, std::int64_t out_stride, const CodeWeights<Rows>& weights) const {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const VecF power = broadcast(weights.power[r]), rescale = broadcast(weights.rescale[r]);
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          VecF digit[code_digits];
#pragma GCC unroll 4
          for (int n = 0; n < code_digits; ++n) digit[n] = to_floats(sums[r][c][n]);
          float* to = out + r * out_stride + (2 * Half + c) * W;
          store(to, fma(load(to), rescale, scale_by_power(join_digits(digit), power)));
        }
      }
    }
  };

  // Adds the products of one row in float. Called for rows whose weights are not `usual`: their integers are 0.
  template <class Memory>
  static void add_floats(const RowBlock& block, const Memory& s, const CodeBunch& bunch, int row) {
    const float* weights = s.scores + row * s.score_stride + bunch.first_key;
    for (std::int64_t dim = 0; dim < block.value_dim; ++dim) {
      float sum = 0;
      for (int j = 0; j < bunch.count; ++j)
        sum = __builtin_fmaf(weights[j], widen(row_of<Int8>(bunch.values, j)[dim]), sum);
      s.out[row * s.out_stride + index_of(dim)] += sum;
    }
  }
};

}  // namespace selfattn::SELFATTN_ISA
