#include "guarded_memory.h"
#include "isa_checks.h"
#include "kernels/pack.h"
#include "lanes.h"

namespace selfattn::SELFATTN_ISA {
namespace {

using test::expect_same;

template <class T>
constexpr T specials[] = {T(0),
                          -T(0),
                          T(1),
                          T(-1),
                          T(0.5),
                          T(1.5),
                          T(-2.5),
                          T(3.7),
                          T(-1e-3),
                          T(7e5),
                          Limits<T>::smallest_normal,
                          Limits<T>::smallest,
                          -Limits<T>::smallest,
                          Limits<T>::largest,
                          infinity<T>,
                          -infinity<T>,
                          not_a_number<T>};
template <class T>
constexpr int special_count = sizeof(specials<T>) / sizeof(T);

// Calls f(a, b, c) with every pair (a, b) of special numbers in every lane. Adjacent lanes hold different numbers.
template <class T, class F>
void for_special_lanes(F f) {
  for (int i = 0; i < special_count<T>; ++i)
    for (int j = 0; j < special_count<T>; ++j) {
      Lanes<T> a, b, c;
      for (int l = 0; l < Vec<T>::width; ++l) {
        a.lane[l] = specials<T>[(i + l) % special_count<T>];
        b.lane[l] = specials<T>[(j + 3 * l) % special_count<T>];
        c.lane[l] = specials<T>[(i + j + 5 * l) % special_count<T>];
      }
      f(a, b, c);
    }
}

template <class T, class Operation, class Scalar>
void check_operation(const char* what, Operation operation, Scalar scalar) {
  for_special_lanes<T>([&](const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c) {
    const Lanes<T> got(operation(a.vec(), b.vec(), c.vec()));
    for (int l = 0; l < Vec<T>::width; ++l) expect_same(got.lane[l], scalar(a.lane[l], b.lane[l], c.lane[l]), what);
  });
}

template <class T>
void check_arithmetic() {
  using V = Vec<T>;
  check_operation<T>("a + b", [](V a, V b, V) { return a + b; }, [](T a, T b, T) { return a + b; });
  check_operation<T>("a - b", [](V a, V b, V) { return a - b; }, [](T a, T b, T) { return a - b; });
  check_operation<T>("a * b", [](V a, V b, V) { return a * b; }, [](T a, T b, T) { return a * b; });
  check_operation<T>("a / b", [](V a, V b, V) { return a / b; }, [](T a, T b, T) { return a / b; });
  check_operation<T>(
      "fma", [](V a, V b, V c) { return fma(a, b, c); }, [](T a, T b, T c) { return scalar_fma(a, b, c); });
  check_operation<T>("max", [](V a, V b, V) { return max(a, b); }, [](T a, T b, T) { return a > b ? a : b; });
  check_operation<T>("abs", [](V a, V, V) { return abs(a); }, [](T a, T, T) { return a < 0 ? -a : a; });
  // If the operand `sign` is NaN or 0, the sign of the result is unspecified.
  check_operation<T>(
      "copy_sign", [](V a, V b, V) { return select(is_nan(b) | (b == broadcast(T(0))), a, copy_sign(a, b)); },
      [](T a, T b, T) { return b != b || b == 0     ? a
                               : (a < 0) == (b < 0) ? a
                                                    : -a; });
}

template <class T>
void check_comparisons() {
  using V = Vec<T>;
  const auto chosen = [](Mask<T> m) { return select(m, broadcast(T(1)), broadcast(T(2))); };
  const auto as_number = [](bool b) { return b ? T(1) : T(2); };
  check_operation<T>(
      "a < b", [&](V a, V b, V) { return chosen(a < b); }, [&](T a, T b, T) { return as_number(a < b); });
  check_operation<T>(
      "a <= b", [&](V a, V b, V) { return chosen(a <= b); }, [&](T a, T b, T) { return as_number(a <= b); });
  check_operation<T>(
      "a == b", [&](V a, V b, V) { return chosen(a == b); }, [&](T a, T b, T) { return as_number(a == b); });
  check_operation<T>(
      "is_nan", [&](V a, V, V) { return chosen(is_nan(a)); }, [&](T a, T, T) { return as_number(a != a); });
  check_operation<T>(
      "mask & mask", [&](V a, V b, V c) { return chosen((a < b) & (b < c)); },
      [&](T a, T b, T c) { return as_number(a < b && b < c); });
  check_operation<T>(
      "mask | mask", [&](V a, V b, V c) { return chosen((a < b) | (b < c)); },
      [&](T a, T b, T c) { return as_number(a < b || b < c); });
  check_operation<T>(
      "select", [](V a, V b, V c) { return select(b < c, a, b); }, [](T a, T b, T c) { return b < c ? a : b; });
  for_special_lanes<T>([](const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>&) {
    int less = 0;
    for (int l = 0; l < Vec<T>::width; ++l) less += a.lane[l] < b.lane[l];
    SELFATTN_CHECK(any(a.vec() < b.vec()) == (less > 0));
    SELFATTN_CHECK(all(a.vec() < b.vec()) == (less == Vec<T>::width));
  });
  for (int alone = 0; alone < Vec<T>::width; ++alone) {  // any() and all() must see each lane
    const Mask<T> one = iota(T()) == broadcast(static_cast<T>(alone));
    SELFATTN_CHECK(any(one) && !all(one));
    SELFATTN_CHECK(
        !all((iota(T()) < broadcast(static_cast<T>(alone))) | (broadcast(static_cast<T>(alone)) < iota(T()))));
  }
  SELFATTN_CHECK(all(iota(T()) == iota(T())) && !any(iota(T()) < iota(T())));
}

template <class T>
void check_loads() {
  constexpr int W = Vec<T>::width;
  const test::GuardedArea area = test::guarded_area();
  for (int n = 0; n <= W; ++n) {
    T* const p = reinterpret_cast<T*>(area.end) - n;
    for (int l = 0; l < n; ++l) p[l] = static_cast<T>(10 + l);
    const Lanes<T> got(load_up_to(p, n));
    for (int l = 0; l < W; ++l) expect_same(got.lane[l], l < n ? 10 + l : 0, "load_partial");
  }
  const Lanes<T> numbers(iota(T())), zeros(broadcast(-T(0)));
  for (int l = 0; l < W; ++l) expect_same(numbers.lane[l], l, "iota");
  for (const T zero : zeros.lane) SELFATTN_CHECK(zero == 0 && __builtin_signbit(zero));
}

template <class T>
void check_stores() {
  constexpr int W = Vec<T>::width;
  const test::GuardedArea area = test::guarded_area();
  T* const first = reinterpret_cast<T*>(area.begin);
  T* const end = reinterpret_cast<T*>(area.end);
  for (int n = 0; n <= W; ++n) {
    T* const places[] = {first, first + 1, end - 3 * W, end - n};  // also next to inaccessible memory
    for (T* const p : places) {
      for (T* q = first; q != end; ++q) *q = T(-7);
      store_up_to(p, iota(T()), n);
      for (T* q = first; q != end; ++q)
        expect_same(*q, q < p || q >= p + n ? -7 : static_cast<double>(q - p), "store_partial");
    }
  }
}

template <class T>
void check_hidden() {
  constexpr int W = Vec<T>::width;
  constexpr std::uint8_t bytes[] = {0, 1, 0, 0, 255, 128, 2, 0, 1, 1, 0, 64, 1, 0, 0, 1, 0};
  constexpr int count = sizeof bytes;
  auto* const p = reinterpret_cast<std::uint8_t*>(test::guarded_area().end) - W;
  for (int first = 0; first < count; ++first) {
    for (int l = 0; l < W; ++l) p[l] = bytes[(first + l) % count];
    const Lanes<T> got(load_hidden(p, T()));
    for (int l = 0; l < W; ++l) expect_same(got.lane[l], p[l] != 0 ? T(0) : -infinity<T>, "load_hidden");
  }
}

template <class T>
void check_powers() {
  constexpr T halves[] = {T(0.5),        T(1.5),       T(2.5),     T(-0.5), T(-1.5),    T(-2.5),
                          T(0.49999994), T(100000.25), T(-1234.5), T(3),    T(4194303), not_a_number<T>};
  for (const T x : halves) {
    const Lanes<T> got(round(broadcast(x)));
    for (const T lane : got.lane) expect_same(lane, __builtin_rint(x), "round");
  }
  constexpr T factors[] = {T(1), T(0.75), T(1.25), T(-1.375), T(0), not_a_number<T>};
  for (const T x : factors)
    for (int power = Limits<T>::lowest_power - 200; power + Vec<T>::width <= -Limits<T>::lowest_power; ++power) {
      const Lanes<T> got(scale_by_power(broadcast(x), broadcast(static_cast<T>(power)) + iota(T())));
      for (int l = 0; l < Vec<T>::width; ++l)
        // Below the lowest normal power, a result must be exact or 0.
        if (power + l >= Limits<T>::lowest_power || got.lane[l] != 0)
          expect_same(got.lane[l], scale(x, power + l), "scale_by_power");
    }
}

template <class T>
void check_reductions() {
  constexpr int W = Vec<T>::width;
  Lanes<T> numbers;
  for (int place = 0; place < W; ++place) {
    for (int l = 0; l < W; ++l) numbers.lane[l] = static_cast<T>(l == place ? -1 : -2 - l);
    expect_same(reduce_max(numbers.vec()), -1, "reduce_max");
    for (int l = 0; l < W; ++l) numbers.lane[l] = l == place ? T(5) : -infinity<T>;
    expect_same(reduce_max(numbers.vec()), 5, "reduce_max");
    for (int l = 0; l < W; ++l) numbers.lane[l] = static_cast<T>(l == place ? 100 : l);
    expect_same(reduce_sum(numbers.vec()), 100 + W * (W - 1) / 2 - place, "reduce_sum");
  }
  expect_same(reduce_max(broadcast(-infinity<T>)), -infinity<T>, "reduce_max");
  Vec<T> rows[W];
  for (int i = 0; i < W; ++i) rows[i] = iota(T()) * broadcast(static_cast<T>(i)) + broadcast(T(1));
  const Lanes<T> sums(reduce_sums(rows));
  for (int i = 0; i < W; ++i) expect_same(sums.lane[i], W + i * W * (W - 1) / 2, "reduce_sums");
  const Lanes<T> backwards(reverse(iota(T())));
  for (int i = 0; i < W; ++i) expect_same(backwards.lane[i], W - 1 - i, "reverse");
  for (int i = 0; i < W; ++i) rows[i] = iota(T()) + broadcast(static_cast<T>(i * W));
  transpose(rows);
  for (int i = 0; i < W; ++i) {
    const Lanes<T> column(rows[i]);
    for (int l = 0; l < W; ++l) expect_same(column.lane[l], l * W + i, "transpose");
  }
}

template <class T>
void check_all() {
  test::begin_section(Limits<T>::name);
  check_arithmetic<T>();
  check_comparisons<T>();
  check_loads<T>();
  check_stores<T>();
  check_hidden<T>();
  check_powers<T>();
  check_reductions<T>();
}

}  // namespace

void check_vectors() {
  check_all<float>();
  check_all<double>();
}

}  // namespace selfattn::SELFATTN_ISA
