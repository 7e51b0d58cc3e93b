#include "guarded_memory.h"
#include "isa_checks.h"
#include "kernels/dropout.h"
#include "lanes.h"
#include "philox.h"

namespace selfattn::SELFATTN_ISA {
namespace {

using test::expect_same;

constexpr std::uint32_t odd_words[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0xd2511f53, 0x12345678, 0xfffffffe};
constexpr int odd_count = sizeof odd_words / sizeof *odd_words;

// Words in lanes whose upper halves are not 0. No result may depend on the upper halves.
Words words_at(int first, int step) {
  std::uint32_t words[Words::width];
  for (int l = 0; l < Words::width; ++l) words[l] = odd_words[(first + step * l) % odd_count];
  const Words high = broadcast_word(1u << 31);
  return load_words(words) ^ multiply(high, high);
}

void check_words() {
  std::uint32_t a[Words::width], b[Words::width], got[Words::width];
  for (int i = 0; i < odd_count; ++i)
    for (int j = 0; j < odd_count; ++j) {
      const Words x = words_at(i, 1), y = words_at(j, 3), product = multiply(x, y);
      store_words(a, x);
      store_words(b, y);
      const auto check = [&](Words found, auto exact, const char* what) {
        store_words(got, found);
        for (int l = 0; l < Words::width; ++l) expect_same(got[l], exact(l), what);
      };
      const auto exact = [&](int l) { return std::uint64_t{a[l]} * b[l]; };
      check(x ^ y, [&](int l) { return a[l] ^ b[l]; }, "a ^ b");
      check(product, [&](int l) { return static_cast<std::uint32_t>(exact(l)); }, "multiply");
      check(upper_half(product), [&](int l) { return static_cast<std::uint32_t>(exact(l) >> 32); }, "upper_half");
      check(broadcast_word(odd_words[i]), [&](int) { return odd_words[i]; }, "broadcast_word");
    }
}

template <class T>
void check_at_least() {
  constexpr int chains = Vec<T>::width / Words::width;
  for (const std::uint32_t limit : odd_words)
    for (int i = 0; i < odd_count; ++i) {
      Words words[chains];
      std::uint32_t word[Vec<T>::width];
      for (int c = 0; c < chains; ++c) {
        words[c] = words_at(i + c, 5);
        store_words(word + c * Words::width, words[c]);
      }
      const Lanes<T> got(select(at_least(words, limit), broadcast(T(1)), broadcast(T(0))));
      for (int l = 0; l < Vec<T>::width; ++l) expect_same(got.lane[l], word[l] >= limit, "at_least");
    }
}

// The test vectors of Random123.
void check_known_answers() {
  constexpr std::uint32_t known[][4] = {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                        {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                        {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  constexpr std::uint32_t counters[][4] = {{}, {~0u, ~0u, ~0u, ~0u}, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}};
  constexpr std::uint64_t keys[] = {0, ~std::uint64_t{0}, 0x299f31d0a4093822};
  for (int i = 0; i < 3; ++i) {
    Words block[1][4];
    for (int w = 0; w < 4; ++w) block[0][w] = broadcast_word(counters[i][w]);
    philox(block, keys[i]);
    for (int w = 0; w < 4; ++w) {
      std::uint32_t got[Words::width];
      store_words(got, block[0][w]);
      for (const std::uint32_t lane : got) expect_same(lane, known[i][w], "philox");
      expect_same(philox_word(counters[i], keys[i], w), known[i][w], "philox_word");
    }
  }
}

// Checks the factors of a tile, and the weights of each of its rows. Both arrays end at a guard.
template <class T>
void check_factors(int count, std::int64_t first_key, int keys, std::int64_t skipped = 0) {
  constexpr int W = Vec<T>::width, most_rows = 3 * W;
  const Dropout dropout{1.25, 0x33333333, 0x0123456789abcdef, skipped};
  Row rows[most_rows]{};
  for (int r = 0; r < count; ++r) {
    rows[r].coordinates[0] = 3;
    rows[r].coordinates[1] = static_cast<std::uint32_t>(r % 3);
    rows[r].coordinates[2] = static_cast<std::uint32_t>(100 + r / 3);
  }
  const auto exact = [&](int row, std::int64_t key_of_call) {
    const std::int64_t key = skipped + key_of_call;
    const std::uint32_t* coordinates = rows[row].coordinates;
    const std::uint32_t counter[4] = {coordinates[0], coordinates[1], coordinates[2],
                                      static_cast<std::uint32_t>(key / 4)};
    return philox_word(counter, dropout.seed, static_cast<int>(key % 4)) < dropout.threshold ? T(0) : T(1.25);
  };
  const int lanes = (count + W - 1) / W * W;
  T* const memory = reinterpret_cast<T*>(test::guarded_area().end) - factor_lines(keys) * lanes;
  const T* const factors = dropout_factors(dropout, {rows, count, lanes}, first_key, keys, memory);
  for (int j = 0; j < keys; ++j)
    for (int r = 0; r < count; ++r) expect_same(factors[j * lanes + r], exact(r, first_key + j), "dropout_factors");
  T* const weights = reinterpret_cast<T*>(test::guarded_area().end) - keys;
  for (int r = 0; r < count; ++r) {
    for (int j = 0; j < keys; ++j) weights[j] = T(1);
    drop<T>(dropout, rows[r], first_key, keys, weights);
    for (int j = 0; j < keys; ++j) expect_same(weights[j], exact(r, first_key + j), "drop");
  }
}

template <class T>
void check_all() {
  test::begin_section(Limits<T>::name);
  check_at_least<T>();
  constexpr int row_counts[] = {1, Vec<T>::width, 2 * Vec<T>::width + 1}, key_counts[] = {1, 2, 3, 4, 7, 32, 41};
  for (const int rows : row_counts)
    for (std::int64_t first = 0; first < 6; ++first)
      for (const int keys : key_counts) check_factors<T>(rows, first, keys);
  check_factors<T>(3, 2, 9, 1001);
  check_factors<T>(2, (std::int64_t{1} << 34) - 5, 9);  // the counter's word for keys wraps around
}

}  // namespace

void check_dropout() {
  test::begin_section("words");
  check_words();
  check_known_answers();
  check_all<float>();
  check_all<double>();
}

}  // namespace selfattn::SELFATTN_ISA
