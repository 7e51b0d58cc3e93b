// AMX: AVX-512 BF16 plus matrix products of tiles.
#pragma once
#include "simd/tiles_amx.h"
#include "simd/vec_avx512_bf16.h"
