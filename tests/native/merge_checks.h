// Checks of merging the results of attention over parts of the keys.
#pragma once
#include "kernels/kernel_set.h"

namespace selfattn::test {

void check_merge(const KernelSet& kernels);

}  // namespace selfattn::test
