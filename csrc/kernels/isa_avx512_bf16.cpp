#define SELFATTN_ISA avx512_bf16
#define SELFATTN_VEC "simd/vec_avx512_bf16.h"
#include "kernels/attend_row.h"
#include "kernels/attend_tile.h"
#include "kernels/backward_pairs.h"
#include "kernels/backward_tile.h"
#include "kernels/engine_pairs.h"
#include "kernels/isa_avx512.h"
#include "kernels/peak_loop.h"
#include "kernels/project_codes.h"
#include "kernels/project_widened.h"
#include "kernels/row_codes.h"

namespace selfattn::avx512_bf16 {

void project_f32(const ProjectArgs& args) noexcept { project<WidenedUnit, 8, 3, float, FloatPair>(args); }

void project_codes(const ProjectArgs& args) noexcept {
  args.digits == 1 ? project_codes<1, 8, 3>(args) : project_codes<2, 8, 3>(args);
}

void split_digits(const float* x, std::int64_t depth, int digits, void* to) noexcept {
  digits == 1 ? split_row<1>(x, depth, to) : split_row<2>(x, depth, to);
}

constexpr ByType<const AttendKernel*> row_kernels() {
  ByType<const AttendKernel*> kernels{};
  kernels[DType::bf16] = &RowAttention<float, 16, BFloat, PairDots>::kernel;
  kernels[DType::i8] = &RowAttention<float, 16, Int8, CodeDots, CodeProducts>::kernel;
  return kernels;
}

// The AVX-512 kernels, and kernels that multiply bfloat16 in pairs and bytes in fours. On CPUs that also have
// AVX512_FP16, this set is not the default: there, a dot product of pairs was measured to take as long as four FMAs
// instead of one.
extern constexpr KernelSet kernels{
    .name = "avx512_bf16",
    .features = feature_avx512 | feature_avx512_bf16,
    .not_default_with = feature_avx512_fp16,
    .f32 = avx512::f32,
    .f64 = avx512::f64,
    .matrix = {.bf16 = &TileAttention<PairEngine<BFloat, 8>, 3>::kernel,
               .f16 = nullptr,
               .f32_highest = nullptr,
               .f32_high = nullptr,
               .f32_medium = &TileAttention<PairEngine<float, 8>, 3>::kernel,
               .row = row_kernels(),
               .project_bf16 = project<PairUnit, 8, 3>,
               .project_f32 = project_f32,
               .project_codes = project_codes,
               .split_digits = split_digits,
               .backward_bf16 = &TileBackward<BackwardPairs, 8, 3, 6, 4>::kernel,
               .peak_loop = peak_loop<PairUnit, 16>},
};

}  // namespace selfattn::avx512_bf16
