#include "guarded_memory.h"
#include "isa_checks.h"
#include "kernels/pack.h"
#include "lanes.h"

namespace selfattn::SELFATTN_ISA {
namespace {

using test::expect_same;

constexpr int W = VecF::width;
constexpr int pattern_count = 1 << 16;
constexpr int positive_count = pattern_count / 2;

template <class E>
struct Format;
template <>
struct Format<Half> {
  static constexpr const char* name = SELFATTN_TEXT(SELFATTN_ISA) " Half";
  static constexpr int fraction_bits = 10, lowest_power = -14;
  static Half of(float x) { return to_half(x); }
};
template <>
struct Format<BFloat> {
  static constexpr const char* name = SELFATTN_TEXT(SELFATTN_ISA) " BFloat";
  static constexpr int fraction_bits = 7, lowest_power = -126;
  static BFloat of(float x) { return to_bfloat(x); }
};

template <class E>
constexpr int infinite_bits = positive_count - (1 << Format<E>::fraction_bits);

// The number that a bit pattern without a sign represents. For the pattern of infinity: the number that would follow
// the largest finite one.
template <class E>
double size_of_pattern(int bits) {
  constexpr int one = 1 << Format<E>::fraction_bits;
  const int exponent = bits / one, fraction = bits % one;
  const int significand = exponent == 0 ? fraction : one + fraction, power = exponent == 0 ? 1 : exponent;
  return __builtin_ldexp(significand, power - 1 + Format<E>::lowest_power - Format<E>::fraction_bits);
}

template <class E>
void expect_widened(float got, int bits, const char* what) {
  const int size = bits & (positive_count - 1);
  double expected = size_of_pattern<E>(size);
  if (size == infinite_bits<E>) expected = infinity<double>;
  if (size > infinite_bits<E>) expected = not_a_number<double>;
  expect_same(got, bits == size ? expected : -expected, what);
  SELFATTN_CHECK((__builtin_signbit(got) != 0) == (bits != size));
}

template <class E>
void check_every_pattern() {
  for (int first = 0; first < pattern_count; first += 2 * W) {
    E elements[2 * W];
    for (int i = 0; i < 2 * W; ++i) elements[i].bits = static_cast<std::uint16_t>(first + i);
    VecF two[2];
    load_adjacent(static_cast<const E*>(elements), two);
    put_in_order(two, E());
    for (int half = 0; half < 2; ++half) {
      const Lanes<float> got(load(static_cast<const E*>(elements) + half * W)), adjacent(two[half]);
      for (int l = 0; l < W; ++l) {
        const int bits = first + half * W + l;
        expect_widened<E>(got.lane[l], bits, "load of 16 bits");
        expect_widened<E>(adjacent.lane[l], bits, "load_adjacent of 16 bits");
        expect_widened<E>(widen(elements[half * W + l]), bits, "widen");
      }
    }
  }
}

// Rounds x and -x in two ways: by storing a vector in which they alternate, and by converting each alone.
template <class E>
void expect_narrowed(float x, int size, const char* what) {
  Lanes<float> numbers;
  for (int l = 0; l < W; ++l) numbers.lane[l] = l % 2 == 0 ? x : -x;
  E elements[W];
  store(static_cast<E*>(elements), numbers.vec());
  for (int l = 0; l < W; ++l) expect_same(elements[l].bits, l % 2 == 0 ? size : positive_count + size, what);
  expect_same(Format<E>::of(x).bits, size, what);
  expect_same(Format<E>::of(-x).bits, positive_count + size, what);
}

// The numbers that round to a pattern lie between the midpoints to its two neighbours. Tries the midpoints and the
// floats next to them.
template <class E>
void check_rounding() {
  for (int bits = 0; bits < infinite_bits<E>; ++bits) {
    const double here = size_of_pattern<E>(bits), next = size_of_pattern<E>(bits + 1);
    const float middle = static_cast<float>((here + next) / 2);
    expect_narrowed<E>(static_cast<float>(here), bits, "store of a number of 16 bits");
    expect_narrowed<E>(middle, bits + bits % 2, "store of a tie");
    expect_narrowed<E>(float_of(bits_of(middle) - 1), bits, "store of less than a tie");
    expect_narrowed<E>(float_of(bits_of(middle) + 1), bits + 1, "store of more than a tie");
  }
  expect_narrowed<E>(Limits<float>::largest, infinite_bits<E>, "store of the largest float");
  expect_narrowed<E>(infinity<float>, infinite_bits<E>, "store of infinity");
  expect_narrowed<E>(Limits<float>::smallest, 0, "store of the smallest float");
}

template <class E>
void check_nan_stays() {
  // Some payloads lose all their bits in the conversion. Others, if rounded, would carry into the exponent.
  constexpr std::uint32_t payloads[] = {0x1, 0x1000, 0x1fff, 0x7fff, 0x8000, 0x3fffff, 0x400000, 0x7fffff};
  constexpr std::uint32_t signs[] = {0, 0x80000000};
  for (const std::uint32_t payload : payloads)
    for (const std::uint32_t sign : signs)
      for (int lane = 0; lane < W; ++lane) {
        float numbers[W] = {};
        const std::uint32_t bits = sign | 0x7f800000u | payload;
        __builtin_memcpy(numbers + lane, &bits, sizeof bits);
        E elements[W];
        store(static_cast<E*>(elements), load(static_cast<const float*>(numbers)));
        for (int l = 0; l < W; ++l) {
          const int size = elements[l].bits & (positive_count - 1);
          SELFATTN_CHECK(l == lane ? size > infinite_bits<E> : size == 0);
        }
        SELFATTN_CHECK((Format<E>::of(numbers[lane]).bits & (positive_count - 1)) > infinite_bits<E>);
      }
}

template <class E>
void check_partial_loads() {
  const test::GuardedArea area = test::guarded_area();
  for (int n = 0; n <= W; ++n) {
    E* const places[] = {reinterpret_cast<E*>(area.begin), reinterpret_cast<E*>(area.end) - n};
    for (E* const p : places) {
      for (int l = 0; l < n; ++l) p[l] = Format<E>::of(static_cast<float>(10 + l));
      const Lanes<float> got(load_up_to(p, n));
      for (int l = 0; l < W; ++l) expect_same(got.lane[l], l < n ? 10 + l : 0, "load_partial of 16 bits");
    }
  }
}

template <class E>
void check_partial_stores() {
  constexpr std::uint16_t untouched = 0xabcd;
  const test::GuardedArea area = test::guarded_area();
  E* const first = reinterpret_cast<E*>(area.begin);
  E* const end = reinterpret_cast<E*>(area.end);
  for (int n = 0; n <= W; ++n) {
    E* const places[] = {first, first + 1, end - 3 * W, end - n};  // also next to inaccessible memory
    for (E* const p : places) {
      for (E* q = first; q != end; ++q) q->bits = untouched;
      store_up_to(p, iota(float()), n);
      for (E* q = first; q != end; ++q) {
        const int expected = q < p || q >= p + n ? untouched : Format<E>::of(static_cast<float>(q - p)).bits;
        expect_same(q->bits, expected, "store_partial of 16 bits");
      }
    }
  }
}

template <class E>
void check_all() {
  test::begin_section(Format<E>::name);
  check_every_pattern<E>();
  check_rounding<E>();
  check_nan_stays<E>();
  check_partial_loads<E>();
  check_partial_stores<E>();
}

// Loads every code in every lane, from memory that ends at an inaccessible page.
void check_codes() {
  test::begin_section(SELFATTN_TEXT(SELFATTN_ISA) " Int8");
  const test::GuardedArea area = test::guarded_area();
  const auto code_of = [](int i) { return static_cast<std::int8_t>(i % 256 - 128); };
  for (int first = 0; first < 256; ++first) {
    Int8* const p = reinterpret_cast<Int8*>(area.end) - W;
    for (int l = 0; l < W; ++l) p[l].code = code_of(first + l);
    const Lanes<float> whole(load(static_cast<const Int8*>(p)));
    for (int l = 0; l < W; ++l) expect_same(whole.lane[l], code_of(first + l), "load of codes");
    expect_same(widen(p[0]), code_of(first), "widen a code");
    for (int n = 0; n <= W; ++n) {
      Int8* const places[] = {reinterpret_cast<Int8*>(area.begin), reinterpret_cast<Int8*>(area.end) - n};
      for (Int8* const q : places) {
        for (int l = 0; l < n; ++l) q[l].code = code_of(first + l);
        const Lanes<float> got(load_up_to(static_cast<const Int8*>(q), n));
        for (int l = 0; l < W; ++l) expect_same(got.lane[l], l < n ? code_of(first + l) : 0, "load_partial of codes");
      }
    }
  }
}

}  // namespace

void check_narrow() {
  check_all<Half>();
  check_all<BFloat>();
  check_codes();
}

}  // namespace selfattn::SELFATTN_ISA
