// What this machine can do at best, measured: the yardsticks of the benchmarks.
#pragma once
#include <cstddef>

#include "kernels/kernel_set.h"

namespace selfattn {

// Floating-point operations a second of one thread in a loop that multiplies on registers only.
double measure_product_peak(PeakLoop loop, double seconds);

// Bytes a second that `num_threads` threads read from a buffer of so many bytes, over and over.
double measure_read_bandwidth(std::size_t bytes, int num_threads, double seconds);

}  // namespace selfattn
