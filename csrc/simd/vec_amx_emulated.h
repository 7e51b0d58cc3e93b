// Emulated AMX, for tests on machines without it.
#pragma once
#include "simd/tiles_emulated.h"
#include "simd/vec_avx512_bf16.h"
