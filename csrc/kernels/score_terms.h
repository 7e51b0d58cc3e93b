// Everything between the product q.k and the softmax: softcap, bias, ALiBi and what is hidden, on one tile of scores.
//
// A tile's vectors run either across query rows (one key each) or across keys (one row each); `Axes` says which, and
// every step is written once for both. Steps are chosen per tile at run time, each a pass over scores that sit in L1.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/exp.h"
#include "kernels/kernel_set.h"
#include "kernels/pack.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
constexpr T minus_infinity = -static_cast<T>(__builtin_inf());

// scores[outer * step + lane]; keys count from the tile's first key.
template <class T>
struct ScoreTile {
  T* scores;
  const T* terms;  // mask and bias in the same shape, or null
  int outer;
  int lanes;  // a multiple of the vector width
  int step;
  bool limited;       // some row sees only a part of the tile's keys ...
  const T* begin;     // ... those in [begin, end), per row
  const T* end;       //
  const T* distance;  // per row: the key at ALiBi distance 0
  const T* slope;     // per row
};

struct AcrossRows {
  template <class T>
  static Vec<T> key(int outer, int) {
    return broadcast(static_cast<T>(outer));
  }
  template <class T>
  static Vec<T> of_row(const T* values, int, int lane) {
    return load(values + lane);
  }
};

struct AcrossKeys {
  template <class T>
  static Vec<T> key(int, int lane) {
    return broadcast(static_cast<T>(lane)) + iota(T());
  }
  template <class T>
  static Vec<T> of_row(const T* values, int outer, int) {
    return broadcast(values[outer]);
  }
};

template <class T, class Change>
inline void change_scores(const ScoreTile<T>& tile, Change change) {
  for (int o = 0; o < tile.outer; ++o)
    for (int l = 0; l < tile.lanes; l += Vec<T>::width) {
      T* score = tile.scores + o * tile.step + l;
      store(score, change(load(score), o, l));
    }
}

template <class Axes, class T>
inline Mask<T> visible(const ScoreTile<T>& tile, int outer, int lane) {
  const Vec<T> key = Axes::template key<T>(outer, lane);
  Mask<T> seen = (Axes::of_row(tile.begin, outer, lane) <= key) & (key < Axes::of_row(tile.end, outer, lane));
  if (tile.terms) {
    const Vec<T> term = load(tile.terms + outer * tile.step + lane);
    seen = seen & ((broadcast(minus_infinity<T>) < term) | is_nan(term));
  }
  return seen;
}

template <class Axes, class T>
inline void apply_terms(const ScoreTile<T>& tile, const ScoreTerms& terms) {
  if (terms.softcap != 0) {
    const Vec<T> cap = broadcast(static_cast<T>(terms.softcap));
    change_scores(tile, [&](Vec<T> s, int, int) { return cap * tanh(s); });
  }
  if (tile.terms) {
    const Vec<T> hidden = broadcast(minus_infinity<T>);
    change_scores(tile, [&](Vec<T> s, int o, int l) {
      const Vec<T> term = load(tile.terms + o * tile.step + l);
      return select(term == hidden, hidden, s + term);  // a sum would let a NaN score through
    });
  }
  if (terms.alibi)
    change_scores(tile, [&](Vec<T> s, int o, int l) {
      const Vec<T> distance = abs(Axes::of_row(tile.distance, o, l) - Axes::template key<T>(o, l));
      return s - Axes::of_row(tile.slope, o, l) * distance;
    });
  // Last, so that nothing that was added brings a hidden key back.
  if (tile.limited || (terms.alibi && tile.terms))
    change_scores(tile, [&](Vec<T> s, int o, int l) {
      return select(visible<Axes>(tile, o, l), s, broadcast(minus_infinity<T>));
    });
}

// One number of a bias array of either type, at any address.
template <class T>
inline T bias_at(const char* p, BiasType type) {
  if (type == BiasType::f32) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return static_cast<T>(x);
  }
  double x;
  std::memcpy(&x, p, sizeof x);
  return static_cast<T>(x);
}

template <class T>
constexpr BiasType bias_type_of = sizeof(T) == sizeof(float) ? BiasType::f32 : BiasType::f64;

// Mask and bias of one row for n <= width keys from `key` on: the bias in log2 units, or -inf where the key is hidden.
// Lanes from n on repeat the last key.
template <class T>
inline Vec<T> term_chunk(const Row& row, const ScoreTerms& terms, std::int64_t key, int n) {
  constexpr int W = Vec<T>::width;
  Vec<T> sum = broadcast(T(0));
  if (row.bias) {
    const char* bias = row.bias + key * terms.bias_step;
    const bool in_place = terms.bias == bias_type_of<T> && terms.bias_step == sizeof(T) && n == W &&
                          reinterpret_cast<std::uintptr_t>(bias) % sizeof(T) == 0;
    T buffer[W];
    if (!in_place)
      for (int j = 0; j < W; ++j) buffer[j] = bias_at<T>(bias + (j < n ? j : n - 1) * terms.bias_step, terms.bias);
    sum = load(in_place ? reinterpret_cast<const T*>(bias) : buffer) * broadcast(static_cast<T>(log2_e));
  }
  if (row.mask) {
    const std::uint8_t* mask = row.mask + key * terms.mask_step;
    std::uint8_t buffer[16] = {};
    if (terms.mask_step != 1 || n < W) {
      for (int j = 0; j < W; ++j) buffer[j] = mask[(j < n ? j : n - 1) * terms.mask_step];
      mask = buffer;
    }
    const Vec<T> hidden = load_hidden(mask, T());
    sum = select(hidden < broadcast(T(0)), hidden, sum);
  }
  return sum;
}

// What a tile of terms holds, to skip tiles that are all hidden and passes that change nothing.
template <class T>
struct TermsSeen {
  Vec<T> largest = broadcast(minus_infinity<T>);  // NaN, once met, may be lost again: it counts as visible below
  bool nan = false;
  bool any_hidden = false;
  bool any_nonzero = false;

  Vec<T> note(Vec<T> term) {
    largest = max(largest, term);
    nan = nan || any(is_nan(term));
    any_hidden = any_hidden || any(term == broadcast(minus_infinity<T>));
    any_nonzero = any_nonzero || !all(term == broadcast(T(0)));
    return term;
  }
  bool all_hidden() const { return !nan && !(reduce_max(largest) > minus_infinity<T>); }
};

}  // namespace selfattn::SELFATTN_ISA
