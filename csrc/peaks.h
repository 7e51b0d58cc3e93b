// Measures the peak performance of this machine, the reference of the benchmarks.
#pragma once
#include <cstddef>

#include "kernels/kernel_set.h"

namespace selfattn {

// Floating-point operations per second of one thread in a loop that only multiplies registers or tiles.
double measure_product_peak(PeakLoop loop, double seconds);

// Bytes per second that `num_threads` threads read when they read a buffer of `bytes` bytes repeatedly.
double measure_read_bandwidth(std::size_t bytes, int num_threads, double seconds);

}  // namespace selfattn
