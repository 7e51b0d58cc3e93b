// Assembles the kernels of one type of computation (float or double) for the ISA of this translation unit.
#pragma once
#include "kernels/attend_row.h"
#include "kernels/attend_tile.h"
#include "kernels/backward_tile.h"
#include "kernels/dropout.h"
#include "kernels/finish.h"
#include "kernels/kernel_set.h"
#include "kernels/norm.h"
#include "kernels/peak_loop.h"
#include "kernels/project.h"

namespace selfattn::SELFATTN_ISA {

template <class T>
inline void weigh(void* scores, std::int64_t count, double row_max, double factor) noexcept {
  T* score = static_cast<T*>(scores);
  const Vec<T> shift = broadcast(static_cast<T>(row_max));
  const Vec<T> scale = broadcast(static_cast<T>(factor));
  for (std::int64_t j = 0; j < count; j += Vec<T>::width) {
    const Vec<T> s = load_up_to(score + j, count - j);
    const Vec<T> weight = exp2(s - shift) * scale;
    // A hidden key has weight 0 even if a visible key made the maximum or the sum NaN.
    store_up_to(score + j, select(s == broadcast(minus_infinity<T>), broadcast(T(0)), weight), count - j);
  }
}

template <class T>
inline void add(const void* numbers, std::int64_t count, double* sums) noexcept {
  const T* number = static_cast<const T*>(numbers);
  for (std::int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(number[j]);
}

template <class T, int Columns>
inline void pack_panel(const void* const* rows, std::int64_t depth, void* panel) noexcept {
  rows_to_columns(static_cast<T*>(panel), Columns, Columns, depth,
                  [&](int row, std::int64_t d, int n) { return load_up_to(static_cast<const T*>(rows[row]) + d, n); });
}

template <class E>
inline void widen(const void* from, std::int64_t count, float* to) noexcept {
  const E* element = static_cast<const E*>(from);
  for (std::int64_t i = 0; i < count; i += VecF::width)
    store_up_to(to + i, load_up_to(element + i, count - i), count - i);
}

// Calls use(index, count, elements) for the elements of each word, converted to the unpacked type.
template <class Word, class Use>
inline void each_word(const void* words, std::int64_t count, Use use) {
  const Word* word = static_cast<const Word*>(words);
  for (std::int64_t i = 0; i < count; i += Word::elements, ++word) {
    Int8 elements[Word::elements];
    unpack(element_at(word), elements);
    use(i, count - i < Word::elements ? count - i : Word::elements, static_cast<const Int8*>(elements));
  }
}

template <class Word>
inline void unpack_words(const void* words, std::int64_t count, void* to) noexcept {
  each_word<Word>(words, count, [&](std::int64_t first, std::int64_t n, const Int8* elements) {
    std::memcpy(static_cast<Int8*>(to) + first, elements, static_cast<std::size_t>(n));
  });
}

template <class Word>
inline void widen_words(const void* words, std::int64_t count, float* to) noexcept {
  each_word<Word>(words, count, [&](std::int64_t first, std::int64_t n, const Int8* elements) {
    widen<Int8>(elements, n, to + first);
  });
}

template <class E>
inline void narrow(const float* from, std::int64_t count, void* to) noexcept {
  E* element = static_cast<E*>(to);
  for (std::int64_t i = 0; i < count; i += VecF::width)
    store_up_to(element + i, load_up_to(from + i, count - i), count - i);
}

template <class T, class E>
inline void transpose(const void* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, DType to_type,
                      void* to) noexcept {
  // A few columns at a time, so that memory is read in a few sequential streams.
  const auto store_as = [&](auto* result) {
    for (std::int64_t first = 0; first < columns; first += Vec<T>::width) {
      const std::int64_t left = columns - first;
      columns_to_rows<T>(
          static_cast<int>(rows), left < Vec<T>::width ? left : Vec<T>::width,
          [&](int row) { return result + row * columns + first; },
          [&](std::int64_t column, int row) {
            return load_up_to(static_cast<const E*>(from) + (first + column) * stride + row, rows - row);
          });
    }
  };
  to_type == dtype_of(E()) ? store_as(static_cast<E*>(to)) : store_as(static_cast<T*>(to));
}

// E: a type that is only stored; computations use float. Results are never rounded to codes, so codes have no `narrow`,
// `transpose` or `finish`.
template <class E, int TileRows, int TileVectors, int MaxSums>
constexpr StoredKernels stored_kernels() {
  StoredKernels kernels{&RowAttention<float, MaxSums, E>::kernel,
                        project<FmaUnit<float>, TileRows, TileVectors, E>,
                        widen<E>,
                        nullptr,
                        nullptr,
                        nullptr,
                        nullptr};
  if constexpr (!scaled<E>) {
    kernels.narrow = narrow<E>;
    kernels.transpose = transpose<float, E>;
    kernels.finish = finish<float, E>;
  }
  return kernels;
}

// Word: several elements of a type that is only stored. Kernels of products read its elements unpacked.
template <class Word>
constexpr StoredKernels word_kernels() {
  static_assert(unpacked_type(dtype_of(Word())) == DType::i8 && sizeof(Word) == size_of(dtype_of(Word())));
  return {nullptr, nullptr, widen_words<Word>, nullptr, nullptr, nullptr, unpack_words<Word>};
}

// Tile shapes and MaxSums are chosen so that sums and operands fit in the registers: see each isa_*.cpp.
template <class T, int TileRows, int TileVectors, int MaxSums, int RowLimit, int SumRows = TileRows,
          int SumVectors = TileVectors>
constexpr TypeKernels type_kernels() {
  TypeKernels kernels{.tile = TileAttention<FmaEngine<T, TileRows>, TileVectors>::kernel,
                      .stored = {},
                      .lanes = Vec<T>::width,
                      .row_limit = RowLimit,
                      .panel_columns = TileVectors * Vec<T>::width,
                      .pack_panel = pack_panel<T, TileVectors * Vec<T>::width>,
                      .weigh = weigh<T>,
                      .add = add<T>,
                      .drop = drop<T>,
                      .normalise = normalise<T>,
                      .peak_loop = peak_loop<FmaUnit<T>, MaxSums>,
                      .backward = TileBackward<BackwardFma<T>, TileRows, TileVectors, SumRows, SumVectors>::kernel};
  const auto stored = [&](auto element) -> StoredKernels& { return kernels.stored[dtype_of(element)]; };
  stored(T()) = {&RowAttention<T, MaxSums>::kernel,
                 project<FmaUnit<T>, TileRows, TileVectors>,
                 nullptr,
                 nullptr,
                 transpose<T, T>,
                 finish<T, T>,
                 nullptr};
  if constexpr (sizeof(T) == sizeof(float)) {
    stored(Half()) = stored_kernels<Half, TileRows, TileVectors, MaxSums>();
    stored(BFloat()) = stored_kernels<BFloat, TileRows, TileVectors, MaxSums>();
    stored(Int8()) = stored_kernels<Int8, TileRows, TileVectors, MaxSums>();
    stored(Int4()) = word_kernels<Int4>();
  }
  return kernels;
}

}  // namespace selfattn::SELFATTN_ISA
