// AVX-512 kernels that the kernel sets of its extensions reuse.
#pragma once
#include "kernels/kernel_set.h"

namespace selfattn::avx512 {

extern const TypeKernels f32, f64;

}  // namespace selfattn::avx512

namespace selfattn::avx512_bf16 {

void project_f32(const ProjectArgs&) noexcept;
void project_codes(const ProjectArgs&) noexcept;
void split_digits(const float* x, std::int64_t depth, int digits, void* to) noexcept;

}  // namespace selfattn::avx512_bf16
