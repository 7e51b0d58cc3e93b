#define SELFATTN_ISA avx2
#define SELFATTN_VEC "simd/vec_avx2.h"
#include "kernels/type_kernels.h"

namespace selfattn::avx2 {

// 4 x 3 sums, 3 vectors of the right-hand side and 1 broadcast use all 16 registers.
constexpr TypeKernels f32 = type_kernels<float, 4, 3, 8, 8, 6, 2>();
constexpr TypeKernels f64 = type_kernels<double, 4, 3, 8, 2, 6, 2>();

extern constexpr KernelSet kernels{
    .name = "avx2",
    .features = feature_avx2_fma,
    .not_default_with = 0,
    .f32 = f32,
    .f64 = f64,
    .matrix = {},
};

}  // namespace selfattn::avx2
