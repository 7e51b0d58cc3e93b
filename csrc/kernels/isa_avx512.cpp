#define SELFATTN_ISA avx512
#define SELFATTN_VEC "simd/vec_avx512.h"
#include "kernels/type_kernels.h"

namespace selfattn::avx512 {

// 8 x 3 sums, 3 vectors of the right-hand side and 1 broadcast: 28 of 32 registers.
extern constexpr KernelSet kernels{
    .name = "avx512",
    .features = feature_avx512,
    .f32 = type_kernels<float, 8, 3, 16, 12>(),
    .f64 = type_kernels<double, 8, 3, 16, 6>(),
    .f16 = conversion<Half>,
    .bf16 = conversion<BFloat>,
};

}  // namespace selfattn::avx512
