// Checks of what a kernel set offers beside attention, through the contract that drivers use.
#pragma once
#include "kernels/kernel_set.h"

namespace selfattn::test {

void check_kernel_set(const KernelSet& kernels);

}  // namespace selfattn::test
