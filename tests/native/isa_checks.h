// Checks that are compiled once per instruction set, with the flags of its kernels. Like kernels, they live in its
// namespace and use neither std:: templates nor exceptions.
#pragma once

namespace selfattn::SELFATTN_ISA {

void check_vectors();    // every operation of simd/vec_*.h
void check_narrow();     // 16-bit numbers and codes in memory
void check_functions();  // exp2 and tanh against long double
void check_loops();      // the micro-kernel, packing and the scan for values that are not finite
void check_dropout();    // words, Philox and the factors of weights

}  // namespace selfattn::SELFATTN_ISA
