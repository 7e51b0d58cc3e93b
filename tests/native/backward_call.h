// A call of a backward kernel, with operands and results that end at inaccessible pages.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "guarded_memory.h"
#include "kernels/kernel_set.h"

namespace selfattn::test {

inline constexpr int key_block = 24;
inline constexpr double multiplier = 0.4;

struct BFloat {
  std::uint16_t bits;
};

template <class T>
double number(T x) {
  return static_cast<double>(x);
}
inline double number(BFloat x) { return static_cast<double>(std::bit_cast<float>(std::uint32_t{x.bits} << 16)); }

template <class T>
void set(T& x, double to) {
  x = static_cast<T>(to);
}
inline void set(BFloat& x, double to) {  // truncates instead of rounding, which does not matter here
  x.bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(to)) >> 16);
}

// Rows of `width` numbers, zero-padded to whole vectors, that end at an inaccessible page.
template <class T>
class Rows {
 public:
  Rows(int count, int width, int lanes)
      : stride_((width + lanes - 1) / lanes * lanes),
        count_(count),
        memory_(static_cast<std::size_t>(count * stride_) * sizeof(T)) {
    std::fill_n(&at(0, 0), count * stride_, T{});
  }

  Rows& random(std::mt19937& source, int width) {
    std::uniform_real_distribution<double> distribution(-1, 1);
    for (int i = 0; i < count_; ++i)
      for (int d = 0; d < width; ++d) set(at(i, d), distribution(source));
    return *this;
  }

  T& at(int row, int column) const { return reinterpret_cast<T*>(memory_.data())[row * stride_ + column]; }
  T* data() const { return &at(0, 0); }
  int stride() const { return stride_; }

 private:
  int stride_, count_;
  GuardedMemory memory_;
};

template <class T, class E>
int operand_lanes(const BackwardKernel& kernel) {
  return kernel.lanes * (sizeof(E) < sizeof(T) ? 2 : 1);
}

// Which results a call computes.
struct Wanted {
  bool dquery = false, dkey = false, dvalue = false, dscore = false;
};
inline constexpr Wanted everything{.dquery = true, .dkey = true, .dvalue = true, .dscore = true};

// A block of rows whose ranges of visible keys differ. Some rows see no key, and some keys are seen by no row. E: the
// type of operands; T: the type of everything else.
template <class T, class E>
struct Call {
  int count, keys, dim, value_dim;
  Rows<E> query, key, value, dout;
  Rows<T> dquery, dkey, dvalue, dscore, shift, factor, delta;
  std::vector<Row> rows;

  Call(const BackwardKernel& kernel, std::mt19937& source, int count_, int keys_, int dim_, int value_dim_)
      : count(count_),
        keys(keys_),
        dim(dim_),
        value_dim(value_dim_),
        query(count, dim, operand_lanes<T, E>(kernel)),
        key(keys, dim, operand_lanes<T, E>(kernel)),
        value(keys, value_dim, operand_lanes<T, E>(kernel)),
        dout(count, value_dim, operand_lanes<T, E>(kernel)),
        dquery(count, dim, kernel.lanes),
        dkey(keys, dim, kernel.lanes),
        dvalue(keys, value_dim, kernel.lanes),
        dscore(count, keys, kernel.lanes),
        shift(1, count, kernel.strip_rows),
        factor(1, count, kernel.strip_rows),
        delta(1, count, kernel.strip_rows) {
    query.random(source, dim);
    key.random(source, dim);
    value.random(source, value_dim);
    dout.random(source, value_dim);
    shift.random(source, count);
    factor.random(source, count);
    delta.random(source, count);
    dkey.random(source, dim);  // as if other blocks of rows had added to it
    dvalue.random(source, value_dim);
    for (int i = 0; i < count; ++i) {
      Row row{};
      row.key_begin = i % 5 == 4 ? 3 : i % 3;
      row.key_end = std::max<std::int64_t>(std::min<std::int64_t>(i * 7 % 90 + 1, keys - 1), row.key_begin);
      row.sink = -std::numeric_limits<double>::infinity();
      rows.push_back(row);
    }
  }

  bool sees(int row, int k) const {
    const Row& r = rows[static_cast<std::size_t>(row)];
    return k >= r.key_begin && k < r.key_end;
  }

  void run(const BackwardKernel& kernel, bool finite, const Wanted& wanted = everything) {
    const std::size_t bytes = kernel.scratch_bytes(count, key_block, dim, value_dim);
    const GuardedMemory scratch((bytes + 63) / 64 * 64);
    std::fill_n(scratch.data(), (bytes + 63) / 64 * 64, '\xff');  // NaN, to detect reads before the first write
    BackwardBlock block{};
    block.rows = rows.data();
    block.count = count;
    block.scoring.multiplier = multiplier;
    block.head_dim = dim;
    block.value_dim = value_dim;
    block.queries = query.data();
    block.dout = dout.data();
    block.shift = shift.data();
    block.factor = factor.data();
    block.delta = delta.data();
    block.dquery = wanted.dquery ? dquery.data() : nullptr;
    block.key_count = keys;
    block.key_block = key_block;
    block.keys = key.data();
    block.values = value.data();
    block.dkeys = wanted.dkey ? dkey.data() : nullptr;
    block.dvalues = wanted.dvalue ? dvalue.data() : nullptr;
    block.finite = finite;
    block.dscores = wanted.dscore ? dscore.data() : nullptr;
    block.dscore_stride = dscore.stride();
    block.scratch = scratch.data();
    kernel.run(block);
  }
};

}  // namespace selfattn::test
