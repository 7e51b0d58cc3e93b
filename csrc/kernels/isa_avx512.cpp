#define SELFATTN_ISA avx512
#define SELFATTN_VEC "simd/vec_avx512.h"
#include "kernels/isa_avx512.h"
#include "kernels/type_kernels.h"

namespace selfattn::avx512 {

// 8 x 3 sums, 3 vectors of the right-hand side and 1 broadcast use 28 of 32 registers.
extern constexpr TypeKernels f32 = type_kernels<float, 8, 3, 16, 12, 6, 4>();
extern constexpr TypeKernels f64 = type_kernels<double, 8, 3, 16, 6, 6, 4>();

extern constexpr KernelSet kernels{
    .name = "avx512",
    .features = feature_avx512,
    .not_default_with = 0,
    .f32 = f32,
    .f64 = f64,
    .matrix = {},
};

}  // namespace selfattn::avx512
