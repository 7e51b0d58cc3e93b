#include "backward_checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "backward_call.h"
#include "check.h"

namespace selfattn::test {
namespace {

template <class T>
double dot(const Rows<T>& a, int i, const Rows<T>& b, int j, int width) {
  double sum = 0;
  for (int d = 0; d < width; ++d) sum += number(a.at(i, d)) * number(b.at(j, d));
  return sum;
}

// Adds the definition's sums to dquery, dkey and dvalue. dkey and dvalue start with what the arrays held before the
// call.
template <class T, class E>
void add_definition(const Call<T, E>& call, std::vector<double>& dquery, std::vector<double>& dkey,
                    std::vector<double>& dvalue, double& largest_dscore_error) {
  for (int i = 0; i < call.count; ++i)
    for (int j = 0; j < call.keys; ++j) {
      if (!call.sees(i, j)) continue;
      const double score = dot(call.query, i, call.key, j, call.dim) * multiplier;
      const double prob =
          std::exp2(score - static_cast<double>(call.shift.at(0, i))) * static_cast<double>(call.factor.at(0, i));
      const double dscore =
          prob * (dot(call.dout, i, call.value, j, call.value_dim) - static_cast<double>(call.delta.at(0, i)));
      largest_dscore_error =
          std::max(largest_dscore_error, std::abs(static_cast<double>(call.dscore.at(i, j)) - dscore));
      for (int d = 0; d < call.dim; ++d) {
        dquery[static_cast<std::size_t>(i * call.dim + d)] += dscore * number(call.key.at(j, d));
        dkey[static_cast<std::size_t>(j * call.dim + d)] += dscore * number(call.query.at(i, d));
      }
      for (int d = 0; d < call.value_dim; ++d)
        dvalue[static_cast<std::size_t>(j * call.value_dim + d)] += prob * number(call.dout.at(i, d));
    }
}

template <class T>
std::vector<double> numbers_of(const Rows<T>& rows, int count, int width) {
  std::vector<double> numbers;
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < width; ++d) numbers.push_back(number(rows.at(i, d)));
  return numbers;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    largest = std::isnan(a[i]) ? a[i] : std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

template <class T, class E>
void check_call(const BackwardKernel& kernel, int count, int keys, int dim, int value_dim) {
  std::mt19937 source(11);
  Call<T, E> call(kernel, source, count, keys, dim, value_dim);
  std::vector<double> dquery(static_cast<std::size_t>(count * dim)), dkey = numbers_of(call.dkey, keys, dim),
                                                                     dvalue = numbers_of(call.dvalue, keys, value_dim);
  call.run(kernel, true);
  // Each sum has at most a few hundred terms of magnitude up to about 20. Kernels that multiply pairs round probs and
  // gradients of scores before they multiply them.
  const double limit = 4e3 * static_cast<double>(std::numeric_limits<T>::epsilon());
  const double sum_limit = sizeof(E) == sizeof(T) ? limit : 0.5;
  double error = 0;
  add_definition(call, dquery, dkey, dvalue, error);
  SELFATTN_CHECK(error <= limit);
  error = std::max(error, largest_difference(numbers_of(call.dquery, count, dim), dquery));
  error = std::max(error, largest_difference(numbers_of(call.dkey, keys, dim), dkey));
  error = std::max(error, largest_difference(numbers_of(call.dvalue, keys, value_dim), dvalue));
  SELFATTN_CHECK(error <= sum_limit);

  // No row sees the last key, and some rows see no key. NaN in this key and in these rows must not change a bit of the
  // results.
  std::mt19937 again(11);
  Call<T, E> spoiled(kernel, again, count, keys, dim, value_dim);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  set(spoiled.key.at(keys - 1, 0), nan);
  set(spoiled.value.at(keys - 1, value_dim - 1), nan);
  for (int i = 0; i < count; ++i) {
    const Row& row = spoiled.rows[static_cast<std::size_t>(i)];
    if (row.key_begin < row.key_end) continue;
    set(spoiled.query.at(i, 0), nan);
    set(spoiled.dout.at(i, 0), nan);
    set(spoiled.delta.at(0, i), nan);
  }
  spoiled.run(kernel, false);
  SELFATTN_CHECK(numbers_of(spoiled.dquery, count, dim) == numbers_of(call.dquery, count, dim));
  SELFATTN_CHECK(numbers_of(spoiled.dkey, keys, dim) == numbers_of(call.dkey, keys, dim));
  SELFATTN_CHECK(numbers_of(spoiled.dvalue, keys, value_dim) == numbers_of(call.dvalue, keys, value_dim));
}

// Each result alone has the bits that it has together with the others, and arrays that are not wanted are not touched.
template <class T, class E>
void check_alone(const BackwardKernel& kernel, int count, int keys, int dim, int value_dim) {
  const auto results = [&](const Wanted& wanted) {
    std::mt19937 source(11);
    Call<T, E> call(kernel, source, count, keys, dim, value_dim);
    call.run(kernel, true, wanted);
    return std::array{numbers_of(call.dquery, count, dim), numbers_of(call.dkey, keys, dim),
                      numbers_of(call.dvalue, keys, value_dim), numbers_of(call.dscore, count, keys)};
  };
  const auto together = results(everything), untouched = results({});
  const Wanted alone[] = {{.dquery = true}, {.dkey = true}, {.dvalue = true}, {.dscore = true}};
  for (std::size_t i = 0; i < std::size(alone); ++i) {
    const auto found = results(alone[i]);
    for (std::size_t j = 0; j < found.size(); ++j) SELFATTN_CHECK(found[j] == (i == j ? together : untouched)[j]);
  }
}

// Checks `add` with rows that end at an inaccessible page.
template <class T>
void check_add(const BackwardKernel& kernel, int count) {
  std::mt19937 source(7);
  const int width = 3 * kernel.lanes, first = width - count;
  Rows<T> from(1, width, kernel.lanes), to(1, width, kernel.lanes);
  from.random(source, width);
  to.random(source, width);
  const std::vector<double> terms = numbers_of(from, 1, width);
  std::vector<double> wanted = numbers_of(to, 1, width);
  for (std::size_t i = static_cast<std::size_t>(first); i < wanted.size(); ++i)
    wanted[i] = static_cast<double>(static_cast<T>(wanted[i] + terms[i]));
  kernel.add(&from.at(0, first), count, &to.at(0, first));
  SELFATTN_CHECK(numbers_of(to, 1, width) == wanted);
}

template <class T, class E>
void check_calls(const BackwardKernel& kernel) {
  for (const int count : {1, kernel.lanes + 1, kernel.strip_rows - 1, kernel.strip_rows, 2 * kernel.strip_rows + 1})
    for (const int keys : {2, key_block, 3 * key_block + 1}) {
      check_call<T, E>(kernel, count, keys, 1, kernel.lanes + 1);
      check_call<T, E>(kernel, count, keys, 2 * kernel.lanes, 3);
      check_call<T, E>(kernel, count, keys, 5 * kernel.lanes - 1, 4 * kernel.lanes);
      check_alone<T, E>(kernel, count, keys, 2 * kernel.lanes + 1, kernel.lanes);
    }
}

template <class T>
void check_kernel(const BackwardKernel& kernel) {
  check_calls<T, T>(kernel);
  std::mt19937 source(3);
  const int width = 3 * kernel.lanes;
  for (int i = 0; i <= width; ++i) check_add<T>(kernel, i);
  Rows<T> a(1, width, kernel.lanes), b(1, width, kernel.lanes);
  a.random(source, width);
  b.random(source, width);
  const double error = std::abs(kernel.dot(a.data(), b.data(), width) - dot(a, 0, b, 0, width));
  SELFATTN_CHECK(error <= width * static_cast<double>(std::numeric_limits<T>::epsilon()));
  for (int i = 0; i < width; ++i) {
    SELFATTN_CHECK(kernel.finite(a.data(), width));
    const T kept = a.at(0, i);
    a.at(0, i) = std::numeric_limits<T>::infinity();
    SELFATTN_CHECK(!kernel.finite(a.data(), width));
    a.at(0, i) = kept;
  }
}

}  // namespace

void check_backward(const KernelSet& kernels) {
  begin_section("backward");
  check_kernel<float>(kernels.f32.backward);
  check_kernel<double>(kernels.f64.backward);
  if (kernels.matrix.backward_bf16) check_calls<float, BFloat>(*kernels.matrix.backward_bf16);
}

}  // namespace selfattn::test
