// The vector vocabulary of the ISA that this translation unit is compiled for.
#pragma once
#ifndef SELFATTN_ISA
#define SELFATTN_ISA portable  // keeps editors and analysers working on a kernel header alone
#define SELFATTN_VEC "simd/vec_portable.h"
#endif
#include SELFATTN_VEC
