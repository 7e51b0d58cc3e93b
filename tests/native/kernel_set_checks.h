// Checks of a kernel set's functions other than attention, through the interface that drivers use.
#pragma once
#include "kernels/kernel_set.h"

namespace selfattn::test {

void check_kernel_set(const KernelSet& kernels);

}  // namespace selfattn::test
