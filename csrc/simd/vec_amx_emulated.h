// AMX where there is none, for tests.
#pragma once
#include "simd/tiles_emulated.h"
#include "simd/vec_avx512_bf16.h"
