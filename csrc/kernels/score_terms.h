// Everything between the product q.k and the softmax, for one tile of scores: relative terms, softcap, ALiBi, bias and
// masks. The steps are chosen per tile at run time. Each is a pass over scores that are in L1.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/element_type.h"
#include "kernels/exp.h"
#include "kernels/kernel_set.h"
#include "kernels/score_tile.h"

namespace selfattn::SELFATTN_ISA {

// Applies softcap and ALiBi. This precedes bias and masks, so that a slope that is not finite cannot make a hidden key
// visible.
template <class Axes, class T>
[[gnu::always_inline]] inline void apply_softcap_and_alibi(const ScoreTile<T>& tile, const Scoring& scoring) {
  if (scoring.softcap != 0) {
    const Vec<T> cap = broadcast(static_cast<T>(scoring.softcap));
    change_scores(tile, [&](Vec<T> s, int, int) { return cap * tanh(s); });
  }
  if (scoring.alibi)
    change_scores(tile, [&](Vec<T> s, int o, int l) {
      const Vec<T> distance = abs(Axes::of_row(tile.limits.distance, o, l) - Axes::template key<T>(o, l));
      return s - Axes::of_row(tile.limits.slope, o, l) * distance;
    });
}

// Sets scores of keys outside the rows' limits to -inf. Comes last, so that no added term can make a hidden key
// visible.
template <class Axes, class T>
[[gnu::always_inline]] inline void hide_beyond_limits(const ScoreTile<T>& tile) {
  if (tile.limited)
    change_scores(tile, [&](Vec<T> s, int o, int l) {
      return select(visible<Axes>(tile, o, l), s, broadcast(minus_infinity<T>));
    });
}

inline bool has_terms(const Scoring& scoring) { return scoring.mask || scoring.bias; }

// Adds the terms from term_vector to scores, and records whether they may have hidden any key.
template <class T>
struct AddTerm {
  // Some callers mask keys with the lowest finite number. Conversion to log2 units must not turn it into -inf.
  static constexpr T limit = largest<T> / T(2);
  Mask<T> hidden = broadcast(T(0)) < broadcast(T(0));

  Vec<T> operator()(Vec<T> score, Vec<T> term) {
    const Mask<T> infinite = abs(term) == broadcast(-minus_infinity<T>);
    hidden = hidden | infinite;  // +inf hides nothing; it is rare, so treating it as -inf here costs little
    const Vec<T> finite = max(broadcast(-limit), min(broadcast(limit), term));
    const Vec<T> sum = fma(finite, broadcast(static_cast<T>(log2_e)), score);
    return select(infinite, term, sum);  // -inf must hide even a NaN score; the sum would be NaN
  }
};

template <class E>
inline E read(const char* p) {
  E element;
  std::memcpy(&element, p, sizeof element);
  return element;
}

// Reads one number of a bias array of any type, at any address. Finite numbers stay finite.
template <class T>
inline T bias_at(const char* p, DType type) {
  if (type == DType::f32) return static_cast<T>(read<float>(p));
  if (type == DType::f16) return static_cast<T>(widen(read<Half>(p)));
  if (type == DType::bf16) return static_cast<T>(widen(read<BFloat>(p)));
  return static_cast<T>(clamp_finite(read<double>(p), static_cast<double>(largest<T>)));
}

// Calls use(pointer) if the numbers of a bias array at `p` can be loaded as a vector of adjacent numbers. Returns
// whether it did.
template <class T, class Use>
[[gnu::always_inline]] inline bool with_numbers(const char* p, DType type, Use use) {
  const auto as = [&](auto element) {
    using E = decltype(element);
    if (type != dtype_of(E()) || reinterpret_cast<std::uintptr_t>(p) % sizeof(E) != 0) return false;
    use(reinterpret_cast<const E*>(p));
    return true;
  };
  if (as(T())) return true;
  if constexpr (sizeof(T) == sizeof(float)) return as(Half()) || as(BFloat());
  return false;
}

// Mask and bias of one row for n <= width keys, starting at `key`: the bias, or -inf where the mask hides the key.
// Lanes from n on repeat the last key.
template <class T>
inline Vec<T> term_vector(const Row& row, const Scoring& scoring, std::int64_t key, int n) {
  constexpr int W = Vec<T>::width;
  Vec<T> term = broadcast(T(0));
  if (row.bias) {
    const char* bias = row.bias + key * scoring.bias_stride;
    if (scoring.bias_stride == 0) {
      term = broadcast(bias_at<T>(bias, scoring.bias_type));
    } else if (n < W || scoring.bias_stride != size_of(scoring.bias_type) ||
               !with_numbers<T>(bias, scoring.bias_type, [&](const auto* numbers) { term = load(numbers); })) {
      T buffer[W];
      for (int j = 0; j < W; ++j)
        buffer[j] = bias_at<T>(bias + (j < n ? j : n - 1) * scoring.bias_stride, scoring.bias_type);
      term = load(buffer);
    }
  }
  if (scoring.mask) {
    const std::uint8_t* mask = row.mask + key * scoring.mask_stride;
    std::uint8_t buffer[16] = {};
    if (scoring.mask_stride != 1 || n < W) {
      for (int j = 0; j < W; ++j) buffer[j] = mask[(j < n ? j : n - 1) * scoring.mask_stride];
      mask = buffer;
    }
    const Vec<T> hidden = load_hidden(mask, T());
    term = row.bias ? select(hidden < broadcast(T(0)), hidden, term) : hidden;
  }
  return term;
}

// Whether a row's limits, its mask or its bias hide a key.
template <class T>
inline bool hides(const Row& row, const Scoring& scoring, std::int64_t key) {
  if (key < row.key_begin || key >= row.key_end) return true;
  if (scoring.mask && row.mask[key * scoring.mask_stride] == 0) return true;
  return scoring.bias && bias_at<T>(row.bias + key * scoring.bias_stride, scoring.bias_type) == minus_infinity<T>;
}

// Whether a key of a tile is hidden from all rows of the tile.
template <class T>
inline bool hides(const ScoreTile<T>& tile, const Scoring& scoring, int key) {
  for (int r = 0; r < tile.num_rows; ++r)
    if (!hides<T>(tile.rows[r], scoring, tile.first_key + key)) return false;
  return true;
}

enum class Sight : std::uint8_t { nothing, some, everything };

// How many of the keys [key, key + count) a row's mask and bias leave visible. Returns `some` also where counting these
// keys would cost more than applying mask and bias.
template <class T>
inline Sight sight_of(const Row& row, const Scoring& scoring, std::int64_t key, int count) {
  if (!scoring.mask || row.bias) {
    for (int j = 0; j < count; j += Vec<T>::width) {
      const Vec<T> term = term_vector<T>(row, scoring, key + j, count - j < Vec<T>::width ? count - j : Vec<T>::width);
      if (!all(term == broadcast(minus_infinity<T>))) return Sight::some;
    }
    return Sight::nothing;
  }
  const std::uint8_t* mask = row.mask + key * scoring.mask_stride;
  int seen = 0;
  if (scoring.mask_stride == 1)
    for (int j = 0; j < count; ++j) seen += mask[j] != 0;
  else
    for (int j = 0; j < count; ++j) seen += mask[j * scoring.mask_stride] != 0;
  return seen == 0 ? Sight::nothing : seen == count ? Sight::everything : Sight::some;
}

// Whether mask and bias leave all, some or none of the keys of a tile visible, over all rows of the tile.
template <class T>
inline Sight sight_of(ScoreTile<T> tile, const Scoring& scoring) {
  const int different = tile.shares_terms ? 1 : tile.num_rows;
  const Sight first = sight_of<T>(tile.rows[0], scoring, tile.first_key, tile.num_keys);
  for (int r = 1; r < different && first != Sight::some; ++r)
    if (sight_of<T>(tile.rows[r], scoring, tile.first_key, tile.num_keys) != first) return Sight::some;
  return first;
}

// Fills tile.limits for `lanes` rows. Lanes without a row see all keys.
template <class T>
inline void describe_rows(ScoreTile<T> tile, int lanes) {
  const auto within = [&](std::int64_t key) {
    const std::int64_t relative = key - tile.first_key;
    return static_cast<T>(relative < 0 ? 0 : relative > tile.num_keys ? tile.num_keys : relative);
  };
  for (int l = 0; l < lanes; ++l) {
    const Row* row = l < tile.num_rows ? tile.rows + l : nullptr;
    tile.limits.begin[l] = row ? within(row->key_begin) : T(0);
    tile.limits.end[l] = row ? within(row->key_end) : static_cast<T>(tile.num_keys);
    tile.limits.distance[l] = row ? static_cast<T>(row->position - tile.first_key) : T(0);
    tile.limits.slope[l] = row ? static_cast<T>(row->slope * log2_e) : T(0);
  }
}

// scores += Row::relative * factor
template <class Axes, class T>
[[gnu::always_inline]] inline void add_relative(const ScoreTile<T>& tile, T factor) {
  const auto vector = [&](const Row& row, int key, int n) {
    return load_up_to(static_cast<const T*>(row.relative) + tile.first_key + key, n);
  };
  Axes::each_vector(tile, tile.scores, vector,
                    [&](T* score, Vec<T> relative) { store(score, fma(relative, broadcast(factor), load(score))); });
}

// Mask and bias of a tile's rows.
template <class T>
struct TileTerms {
  const ScoreTile<T>& tile;
  const Scoring& scoring;

  Vec<T> operator()(const Row& row, int key, int n) const {
    return term_vector<T>(row, scoring, tile.first_key + key, n);
  }

  // Calls use(address, terms) for all keys and rows. `address` points into `array`, which has the tile's shape.
  template <class Use>
  [[gnu::always_inline]] void each(AcrossKeys, T* array, Use use) const {
    AcrossKeys::each_vector(tile, array, *this, use);
  }

  template <class Use>
  [[gnu::always_inline]] void each(AcrossRows, T* array, Use use) const {
    constexpr int W = Vec<T>::width;
    for (int j = 0; j < tile.num_keys; j += W) {
      const int n = tile.num_keys - j < W ? tile.num_keys - j : W;
      T* first = array + j * tile.stride;
      if (tile.shares_terms) {  // the terms depend on keys only: read once, then broadcast
        T shared[W];
        store(shared, (*this)(tile.rows[0], j, n));
        for (int i = 0; i < n; ++i)
          for (int l = 0; l < tile.lanes; l += W) use(first + i * tile.stride + l, broadcast(shared[i]));
        continue;
      }
      for (int l = 0; l < tile.lanes; l += W) {
        if (scoring.toeplitz && l + W <= tile.num_rows) {
          const T* last = reinterpret_cast<const T*>(tile.rows[l + W - 1].bias) + tile.first_key + j;
          for (int i = 0; i < n; ++i) use(first + i * tile.stride + l, reverse(load(last + i)));
        } else if (are_adjacent(l)) {
          const char* bias = tile.rows[l].bias + (tile.first_key + j) * scoring.bias_stride;
          for (int i = 0; i < n; ++i, bias += scoring.bias_stride)
            with_numbers<T>(bias, scoring.bias_type,
                            [&](const auto* numbers) { use(first + i * tile.stride + l, load(numbers)); });
        } else {
          AcrossRows::each_of_square(tile, array, AcrossRows::Square{j, n, l}, *this, use);
        }
      }
    }
  }

 private:
  // Whether the biases of a vector of rows can be loaded as a vector: there is no mask, and the rows' biases for a key
  // are adjacent, as in a transposed bias.
  bool are_adjacent(int lane) const {
    const std::int64_t size = size_of(scoring.bias_type);
    const Row* rows = tile.rows + lane;
    if (scoring.mask || scoring.bias_stride == size || scoring.bias_stride % size != 0 ||
        lane + Vec<T>::width > tile.num_rows)
      return false;
    if (!with_numbers<T>(rows[0].bias, scoring.bias_type, [](const auto*) {})) return false;
    for (int i = 1; i < Vec<T>::width; ++i)
      if (rows[i].bias != rows[0].bias + i * size) return false;
    return true;
  }
};

// scores += mask and bias. Returns whether they may hide any key.
template <class Axes, class T>
[[gnu::always_inline]] inline bool add_terms(const ScoreTile<T>& tile, const Scoring& scoring) {
  AddTerm<T> add;
  TileTerms<T>{tile, scoring}.each(Axes(), tile.scores,
                                   [&](T* score, Vec<T> term) { store(score, add(load(score), term)); });
  return any(add.hidden);
}

// Stores mask and bias without the scores, for the rare tile that needs them a second time.
template <class Axes, class T>
inline const T* gather_terms(ScoreTile<T> tile, const Scoring& scoring, T* to) {
  TileTerms<T>{tile, scoring}.each(Axes(), to, [](T* address, Vec<T> term) { store(address, term); });
  return to;
}

// Stores the scores, as they enter the softmax, in Row::scores.
template <class Axes, class T>
inline void keep_scores(ScoreTile<T> tile) {
  Axes::store_rows(tile, [&](const Row& row) { return static_cast<T*>(row.scores) + tile.first_key; });
}

// Turns scaled products into scores. Returns whether mask or bias may hide any key.
template <class Axes, class T>
[[gnu::always_inline]] inline bool complete_scores(const ScoreTile<T>& tile, const Scoring& scoring, Sight sight) {
  apply_softcap_and_alibi<Axes>(tile, scoring);
  const bool hidden = sight != Sight::everything && add_terms<Axes>(tile, scoring);
  hide_beyond_limits<Axes>(tile);
  if (tile.rows->scores) keep_scores<Axes>(tile);
  return hidden;
}

}  // namespace selfattn::SELFATTN_ISA
