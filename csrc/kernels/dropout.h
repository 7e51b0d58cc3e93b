// Dropout: decides which weights are kept (decision 11). The random numbers come from Philox4x32-10 (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", 2011). Philox is a cipher: it encrypts a counter, with the seed as the
// cipher's key. So a weight's random number depends only on the seed and on the weight's batch entry, head, query and
// key. One block of the cipher has the words of four adjacent keys of a row.
#pragma once
#include <cstdint>

#include "kernels/kernel_set.h"
#include "kernels/score_tile.h"

namespace selfattn::SELFATTN_ISA {

constexpr int keys_per_block = 4;

// Encrypts several vectors of counters at once, which hides the latency of multiplications.
template <int Chains>
[[gnu::always_inline]] inline void philox(Words (&blocks)[Chains][4], std::uint64_t key) {
  const Words first = broadcast_word(0xD2511F53), third = broadcast_word(0xCD9E8D57);
  for (std::uint32_t round = 0; round < 10; ++round) {
    const Words low = broadcast_word(static_cast<std::uint32_t>(key) + round * 0x9E3779B9);
    const Words high = broadcast_word(static_cast<std::uint32_t>(key >> 32) + round * 0xBB67AE85);
    for (auto& word : blocks) {
      const Words a = multiply(word[0], first), b = multiply(word[2], third);
      word[0] = upper_half(b) ^ word[1] ^ low;
      word[1] = b;
      word[2] = upper_half(a) ^ word[3] ^ high;
      word[3] = a;
    }
  }
}

// The rows and the number of lanes of a tile whose vectors run across rows. Lanes from `count` on have no row.
struct RowLanes {
  const Row* rows;
  int count, lanes;
};

// The largest number of lines that dropout_factors writes for `keys` keys: it writes whole pairs of keys, and whole
// blocks of the cipher.
constexpr std::int64_t factor_lines(std::int64_t keys) { return round_up(keys, 2) + 2 * (keys_per_block - 1); }

// Computes the factors of weights, 0 or dropout.factor: factors[key][lane]. Returns the line of the first key. Some
// kernels process keys in pairs: if the number of keys is odd, the second key of the last pair has a line, too.
// Arguments are passed by value: the compiler then knows that stores to `factors` do not change them, and keeps what it
// computes from them in registers.
template <class T>
[[gnu::noinline]] inline const T* dropout_factors(const Dropout dropout, const RowLanes tile, std::int64_t first_key,
                                                  int keys, T* factors) {
  first_key += dropout.first_key;
  constexpr int W = Vec<T>::width, chains = W / Words::width;
  const Vec<T> factor = broadcast(static_cast<T>(dropout.factor)), zero = broadcast(T(0));
  const std::int64_t first = first_key / keys_per_block;
  const std::int64_t end = ceil_div(first_key + round_up(keys, 2), keys_per_block);
  for (int lane = 0; lane < tile.lanes; lane += W) {
    std::uint32_t coordinates[3][W] = {};
    for (int i = 0; i < W && lane + i < tile.count; ++i)
      for (int w = 0; w < 3; ++w) coordinates[w][i] = tile.rows[lane + i].coordinates[w];
    T* line = factors + lane;
    for (std::int64_t block = first; block < end; ++block) {
      Words words[chains][4];
      for (int c = 0; c < chains; ++c) {
        for (int w = 0; w < 3; ++w) words[c][w] = load_words(coordinates[w] + c * Words::width);
        words[c][3] = broadcast_word(static_cast<std::uint32_t>(block));
      }
      philox(words, dropout.seed);
      for (int key = 0; key < keys_per_block; ++key, line += tile.lanes) {
        Words word[chains];
        for (int c = 0; c < chains; ++c) word[c] = words[c][key];
        store(line, select(at_least(word, dropout.threshold), factor, zero));
      }
    }
  }
  return factors + first_key % keys_per_block * tile.lanes;
}

// Multiplies the weights of one row by their factors.
template <class T>
inline void drop(const Dropout& dropout, const Row& row, std::int64_t first_key, std::int64_t count,
                 void* weights) noexcept {
  constexpr int lanes = Words::width;
  first_key += dropout.first_key;
  const std::int64_t end = first_key + count;
  for (std::int64_t block = first_key / keys_per_block; block * keys_per_block < end; block += lanes) {
    Words words[1][4];
    for (int w = 0; w < 3; ++w) words[0][w] = broadcast_word(row.coordinates[w]);
    std::uint32_t word[keys_per_block][lanes];
    for (int i = 0; i < lanes; ++i) word[0][i] = static_cast<std::uint32_t>(block + i);
    words[0][3] = load_words(word[0]);
    philox(words, dropout.seed);
    for (int w = 0; w < keys_per_block; ++w) store_words(word[w], words[0][w]);
    for (int i = 0; i < keys_per_block * lanes; ++i) {
      const std::int64_t key = block * keys_per_block + i;
      if (key < first_key || key >= end) continue;
      const bool dropped = word[i % keys_per_block][i / keys_per_block] < dropout.threshold;
      static_cast<T*>(weights)[key - first_key] *= dropped ? T(0) : static_cast<T>(dropout.factor);
    }
  }
}

}  // namespace selfattn::SELFATTN_ISA
