// Checks of the kernels of the backward pass, through the interface that their driver uses.
#pragma once
#include "kernels/kernel_set.h"

namespace selfattn::test {

void check_backward(const KernelSet& kernels);

}  // namespace selfattn::test
