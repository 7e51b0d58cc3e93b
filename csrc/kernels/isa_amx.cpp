#define SELFATTN_ISA amx
#define SELFATTN_VEC "simd/vec_amx.h"
#include "kernels/amx_kernels.h"

namespace selfattn::amx {

extern constexpr KernelSet kernels = amx_kernels("amx", feature_amx);

}  // namespace selfattn::amx
