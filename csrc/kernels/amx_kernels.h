// The kernel set of AMX: the AVX-512 kernels, and kernels that multiply bfloat16.
#pragma once
#include "kernels/attend_tile.h"
#include "kernels/engine_amx.h"
#include "kernels/isa_avx512.h"
#include "kernels/project_amx.h"

namespace selfattn::SELFATTN_ISA {

// A strip is two tiles wide. f32_highest is null: at full accuracy, each float32 product takes six bfloat16 products,
// and no kernel with six products is known to be faster than FMA.
template <class E, int SplitTerms>
constexpr AttendKernel amx_tile = TileAttention<AmxEngine<E, SplitTerms>, 2>::kernel;

constexpr KernelSet amx_kernels(const char* name, std::uint32_t feature) {
  return {
      .name = name,
      .features = feature_avx512 | feature_avx512_bf16 | feature,
      .not_default_with = 0,
      .f32 = avx512::f32,
      .f64 = avx512::f64,
      .matrix = {.bf16 = &amx_tile<BFloat, 1>,
                 .f16 = &amx_tile<Half, 2>,
                 .f32_highest = nullptr,
                 .f32_high = &amx_tile<float, 2>,
                 .f32_medium = &amx_tile<float, 1>,
                 .row = {},
                 .project_bf16 = project_amx,
                 .project_f32 = avx512_bf16::project_f32,
                 .project_codes = avx512_bf16::project_codes,
                 .split_digits = avx512_bf16::split_digits,
                 .backward_bf16 = nullptr,
                 .peak_loop = tile_loop},
  };
}

}  // namespace selfattn::SELFATTN_ISA
