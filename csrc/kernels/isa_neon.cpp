#define SELFATTN_ISA neon
#define SELFATTN_VEC "simd/vec_neon.h"
#include "kernels/type_kernels.h"

namespace selfattn::neon {

// 8 x 3 sums, 3 vectors of the right-hand side and 1 broadcast use 28 of 32 registers. Every AArch64 CPU has these
// instructions, so no feature is required.
constexpr TypeKernels f32 = type_kernels<float, 8, 3, 16, 6, 6, 4>();
constexpr TypeKernels f64 = type_kernels<double, 8, 3, 16, 2, 6, 4>();

extern constexpr KernelSet kernels{
    .name = "neon",
    .features = 0,
    .not_default_with = 0,
    .f32 = f32,
    .f64 = f64,
    .matrix = {},
};

}  // namespace selfattn::neon
