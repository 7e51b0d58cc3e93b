// Makes the Carver of kernels/scratch.h available to drivers. Include this header only in .cpp files of drivers: each
// instruction set has its own Carver, and a kernel that includes this header would get core's Carver instead.
#pragma once

#define SELFATTN_ISA core  // compiles this header with baseline flags, in namespace core
#include "kernels/scratch.h"
#undef SELFATTN_ISA

namespace selfattn {
using core::Carver;
}
