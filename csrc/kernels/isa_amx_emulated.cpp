#define SELFATTN_ISA amx_emulated
#define SELFATTN_VEC "simd/vec_amx_emulated.h"
#include "kernels/amx_kernels.h"

namespace selfattn::amx_emulated {

extern constexpr KernelSet kernels = amx_kernels("amx_emulated", 0);

}  // namespace selfattn::amx_emulated
