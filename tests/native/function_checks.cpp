#include "isa_checks.h"
#include "kernels/exp.h"
#include "lanes.h"

namespace selfattn::SELFATTN_ISA {
namespace {

constexpr int samples = 20000;

// Evaluates a function at point(0), point(1), ..., one vector at a time, and calls visit(x, y) for at least `samples`
// points.
template <class T, class Point, class Function, class Visit>
void sample(Point point, Function function, Visit visit) {
  for (int i = 0; i < samples; i += Vec<T>::width) {
    Lanes<T> x;
    for (int l = 0; l < Vec<T>::width; ++l) x.lane[l] = static_cast<T>(point(i + l));
    const Lanes<T> y(function(x.vec()));
    for (int l = 0; l < Vec<T>::width; ++l) visit(x.lane[l], y.lane[l]);
  }
}

// The relative error in units of 2^-24 (double: 2^-53).
template <class T>
double error_in_units(T got, long double exact) {
  const long double error = got - exact;
  return static_cast<double>((error < 0 ? -error : error) / (exact < 0 ? -exact : exact) / Limits<T>::unit);
}

template <class T>
void check_exp2() {
  const auto at = [](T t) { return Lanes<T>(exp2(broadcast(t))).lane[0]; };
  test::expect_same(at(-infinity<T>), 0, "exp2(-inf)");
  test::expect_same(at(-Limits<T>::largest), 0, "exp2 of the lowest number");
  test::expect_same(at(not_a_number<T>), not_a_number<T>, "exp2(nan)");
  for (int power = 0; power >= 10 * Limits<T>::lowest_power; --power) {
    const T got = at(static_cast<T>(power));
    if (power >= Limits<T>::lowest_power)
      test::expect_same(got, scale(T(1), power), "exp2 of an integer");
    else
      SELFATTN_CHECK(got == 0 || got == scale(T(1), power));
  }
  double worst = 0, worst_below = 0;
  // Down to 30 below the lowest normal power: results become subnormal, then 0.
  const double range = Limits<T>::lowest_power - 30.0;
  sample<T>([&](int i) { return range * i / samples; }, [](Vec<T> t) { return exp2(t); },
            [&](T t, T got) {
              const long double exact = __builtin_exp2l(t);
              const double error = error_in_units(got, exact);
              if (exact >= Limits<T>::smallest_normal) {
                worst = error > worst ? error : worst;
              } else {
                const double below = static_cast<double>((got < exact ? exact - got : got - exact) /
                                                         static_cast<long double>(Limits<T>::smallest_normal));
                worst_below = below > worst_below ? below : worst_below;
              }
            });
  test::expect_at_most(worst, 2, "exp2, relative error in units of rounding");
  test::expect_at_most(worst_below, 1, "exp2 below the normal numbers, error over the smallest of them");
}

template <class T>
void check_tanh() {
  const auto at = [](T x) { return Lanes<T>(tanh(broadcast(x))).lane[0]; };
  test::expect_same(at(infinity<T>), 1, "tanh(inf)");
  test::expect_same(at(-infinity<T>), -1, "tanh(-inf)");
  test::expect_same(at(0), 0, "tanh(0)");
  test::expect_same(at(not_a_number<T>), not_a_number<T>, "tanh(nan)");
  double worst = 0;
  // Magnitudes 2^-60 .. 2^6 of both signs.
  sample<T>(
      [](int i) {
        const double size = __builtin_exp2(66.0 * i / samples - 60);
        return i % 2 == 0 ? size : -size;
      },
      [](Vec<T> x) { return tanh(x); },
      [&](T x, T got) {
        const double error = error_in_units(got, __builtin_tanhl(x));
        worst = error > worst ? error : worst;
        SELFATTN_CHECK((got < 0) == (x < 0));
      });
  test::expect_at_most(worst, 6, "tanh, relative error in units of rounding");
}

}  // namespace

void check_functions() {
  test::begin_section(Limits<float>::name);
  check_exp2<float>();
  check_tanh<float>();
  test::begin_section(Limits<double>::name);
  check_exp2<double>();
  check_tanh<double>();
}

}  // namespace selfattn::SELFATTN_ISA
