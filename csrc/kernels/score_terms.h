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
template <class T>
constexpr T largest = sizeof(T) == sizeof(float) ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);

// scores[outer * step + lane]; keys count from the tile's first key.
template <class T>
struct ScoreTile {
  T* scores;
  const T* terms;  // mask and bias in the same shape where `visible` is to see them, or null
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

// Softcap and ALiBi, before bias and masks: a slope that is not finite cannot bring a hidden key back.
template <class Axes, class T>
inline void bend_scores(const ScoreTile<T>& tile, const ScoreTerms& terms) {
  if (terms.softcap != 0) {
    const Vec<T> cap = broadcast(static_cast<T>(terms.softcap));
    change_scores(tile, [&](Vec<T> s, int, int) { return cap * tanh(s); });
  }
  if (terms.alibi)
    change_scores(tile, [&](Vec<T> s, int o, int l) {
      const Vec<T> distance = abs(Axes::of_row(tile.distance, o, l) - Axes::template key<T>(o, l));
      return s - Axes::of_row(tile.slope, o, l) * distance;
    });
}

// Last, so that nothing that was added brings a hidden key back.
template <class Axes, class T>
inline void hide_beyond_limits(const ScoreTile<T>& tile) {
  if (tile.limited)
    change_scores(tile, [&](Vec<T> s, int o, int l) {
      return select(visible<Axes>(tile, o, l), s, broadcast(minus_infinity<T>));
    });
}

inline bool has_terms(const ScoreTerms& terms) { return terms.mask || terms.bias != BiasType::none; }

// Adds what term_chunk gives to scores and notes whether it may have hidden any.
template <class T>
struct AddTerm {
  // In log2 units the lowest finite numbers, which some use to mean "almost hidden", must not become -inf.
  static constexpr T limit = largest<T> / T(2);
  Mask<T> hidden = broadcast(T(0)) < broadcast(T(0));

  Vec<T> operator()(Vec<T> score, Vec<T> term) {
    const Mask<T> infinite = abs(term) == broadcast(-minus_infinity<T>);
    hidden = hidden | infinite;  // +inf hides nothing, but is rare enough to be looked at twice
    const Vec<T> finite = max(broadcast(-limit), min(broadcast(limit), term));
    const Vec<T> sum = fma(finite, broadcast(static_cast<T>(log2_e)), score);
    return select(infinite, term, sum);  // a sum alone would let a NaN score through
  }
};

template <class E>
inline E read(const char* p) {
  E element;
  std::memcpy(&element, p, sizeof element);
  return element;
}

// One number of a bias array of any type, at any address. A finite number stays finite.
template <class T>
inline T bias_at(const char* p, BiasType type) {
  if (type == BiasType::f32) return static_cast<T>(read<float>(p));
  if (type == BiasType::f16) return static_cast<T>(widen(read<Half>(p)));
  if (type == BiasType::bf16) return static_cast<T>(widen(read<BFloat>(p)));
  const double x = read<double>(p);
  if (x < -largest<T> && x > minus_infinity<double>) return -largest<T>;
  if (x > largest<T> && x < -minus_infinity<double>) return largest<T>;
  return static_cast<T>(x);
}

template <class T>
constexpr BiasType bias_type_of = sizeof(T) == sizeof(float) ? BiasType::f32 : BiasType::f64;

// Mask and bias of one row for n <= width keys from `key` on: the bias, or -inf where the key is hidden. Lanes from n
// on repeat the last key.
template <class T>
inline Vec<T> term_chunk(const Row& row, const ScoreTerms& terms, std::int64_t key, int n) {
  constexpr int W = Vec<T>::width;
  Vec<T> term = broadcast(T(0));
  if (row.bias) {
    const char* bias = row.bias + key * terms.bias_step;
    const bool in_place = terms.bias == bias_type_of<T> && terms.bias_step == sizeof(T) && n == W &&
                          reinterpret_cast<std::uintptr_t>(bias) % sizeof(T) == 0;
    T buffer[W];
    if (!in_place)
      for (int j = 0; j < W; ++j) buffer[j] = bias_at<T>(bias + (j < n ? j : n - 1) * terms.bias_step, terms.bias);
    term = load(in_place ? reinterpret_cast<const T*>(bias) : buffer);
  }
  if (terms.mask) {
    const std::uint8_t* mask = row.mask + key * terms.mask_step;
    std::uint8_t buffer[16] = {};
    if (terms.mask_step != 1 || n < W) {
      for (int j = 0; j < W; ++j) buffer[j] = mask[(j < n ? j : n - 1) * terms.mask_step];
      mask = buffer;
    }
    const Vec<T> hidden = load_hidden(mask, T());
    term = row.bias ? select(hidden < broadcast(T(0)), hidden, term) : hidden;
  }
  return term;
}

enum class Sight : std::uint8_t { nothing, some, everything };

// What a row's mask and bias leave of some keys: `some` where telling more would cost more than using it.
template <class T>
inline Sight sight_of(const Row& row, const ScoreTerms& terms, std::int64_t key, int count) {
  if (!terms.mask || row.bias) {
    for (int j = 0; j < count; j += Vec<T>::width) {
      const Vec<T> term = term_chunk<T>(row, terms, key + j, count - j < Vec<T>::width ? count - j : Vec<T>::width);
      if (!all(term == broadcast(minus_infinity<T>))) return Sight::some;
    }
    return Sight::nothing;
  }
  const std::uint8_t* mask = row.mask + key * terms.mask_step;
  int seen = 0;
  if (terms.mask_step == 1)
    for (int j = 0; j < count; ++j) seen += mask[j] != 0;
  else
    for (int j = 0; j < count; ++j) seen += mask[j * terms.mask_step] != 0;
  return seen == 0 ? Sight::nothing : seen == count ? Sight::everything : Sight::some;
}

// The same for some rows together.
template <class T>
inline Sight sight_of(const Row* rows, int num_rows, const ScoreTerms& terms, std::int64_t key, int count) {
  const Sight first = sight_of<T>(rows[0], terms, key, count);
  for (int r = 1; r < num_rows && first != Sight::some; ++r)
    if (sight_of<T>(rows[r], terms, key, count) != first) return Sight::some;
  return first;
}

}  // namespace selfattn::SELFATTN_ISA
