// Normalisation of a row.
#pragma once
#include "kernels/kernel_set.h"
#include "kernels/pack.h"

namespace selfattn::SELFATTN_ISA {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// Adds up the results of use(i, n) for the vectors of a row. i is a vector's first element. In the last vector, n is
// the number of elements that are left; in other vectors, it is at least the vector's width.
template <class T, class Use>
inline T sum_over_row(std::int64_t count, Use use) {
  constexpr int W = Vec<T>::width;
  Vec<T> sums[4] = {broadcast(T(0)), broadcast(T(0)), broadcast(T(0)), broadcast(T(0))};
  std::int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W)
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + use(i + j * W, std::int64_t{W});
  for (; i < count; i += W) sums[0] = sums[0] + use(i, count - i);
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The mean is subtracted twice, because the first mean is rounded. Differences are stored and loaded again before they
// are squared: lanes beyond the end of the row are then 0 instead of -mean.
template <class T>
inline void normalise(const NormArgs& args) noexcept {
  T* row = static_cast<T*>(args.row);
  const T* addend = static_cast<const T*>(args.addend);
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  const T count = static_cast<T>(args.count);
  if (addend)
    for (std::int64_t i = 0; i < args.count; i += Vec<T>::width)
      store_up_to(row + i, load_up_to(row + i, args.count - i) + load_up_to(addend + i, args.count - i),
                  args.count - i);
  if (args.centred)
    for (int step = 0; step < 2; ++step) {
      const T sum = sum_over_row<T>(args.count, [&](std::int64_t i, std::int64_t n) { return load_up_to(row + i, n); });
      const Vec<T> mean = broadcast(sum / count);
      for (std::int64_t i = 0; i < args.count; i += Vec<T>::width)
        store_up_to(row + i, load_up_to(row + i, args.count - i) - mean, args.count - i);
    }
  const T squares = sum_over_row<T>(args.count, [&](std::int64_t i, std::int64_t n) {
    const Vec<T> v = load_up_to(row + i, n);
    return v * v;
  });
  const Vec<T> factor = broadcast(T(1) / square_root(squares / count + static_cast<T>(args.epsilon)));
  for (std::int64_t i = 0; i < args.count; i += Vec<T>::width) {
    const std::int64_t left = args.count - i;
    Vec<T> v = load_up_to(row + i, left) * factor;
    if (weight) v = v * load_up_to(weight + i, left);
    if (bias) v = v + load_up_to(bias + i, left);
    store_up_to(row + i, v, left);
  }
}

}  // namespace selfattn::SELFATTN_ISA
