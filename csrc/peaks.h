// What this machine can do at best, measured: the yardsticks of the benchmarks.
#pragma once
#include <cstddef>

#include "kernels/kernel_set.h"

namespace selfattn {

// Floating-point operations a second of one thread on registers only.
double measure_fma_peak(const TypeKernels& kernels, double seconds);

// Bytes a second that `num_threads` threads read from a buffer of so many bytes, over and over.
double measure_read_bandwidth(std::size_t bytes, int num_threads, double seconds);

}  // namespace selfattn
