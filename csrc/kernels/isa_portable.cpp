#define SELFATTN_ISA portable
#define SELFATTN_VEC "simd/vec_portable.h"
#include "kernels/type_kernels.h"

namespace selfattn::portable {

// 4 x 2 sums, 2 vectors of the right-hand side and 1 broadcast use 11 of 16 registers.
constexpr TypeKernels f32 = type_kernels<float, 4, 2, 8, 6>();
constexpr TypeKernels f64 = type_kernels<double, 4, 2, 8, 2>();

extern constexpr KernelSet kernels{
    .name = "portable",
    .features = 0,
    .not_default_with = 0,
    .f32 = f32,
    .f64 = f64,
    .matrix = {},
};

}  // namespace selfattn::portable
