// kernels/scratch.h for drivers. Include it in source files only: kernels have a Carver of their own.
#pragma once

#define SELFATTN_ISA core  // compiles this header with baseline flags, in namespace core
#include "kernels/scratch.h"
#undef SELFATTN_ISA

namespace selfattn {
using core::Carver;
}
