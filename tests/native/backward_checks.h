// Checks of the kernel of the backward pass, through the contract that its driver uses.
#pragma once
#include "kernels/kernel_set.h"

namespace selfattn::test {

void check_backward(const KernelSet& kernels);

}  // namespace selfattn::test
