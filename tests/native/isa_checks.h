// Checks that are compiled once per instruction set, with the flags of its kernels. They live in its namespace and use
// neither std:: templates nor exceptions, as kernels do.
#pragma once

namespace selfattn::SELFATTN_ISA {

void check_vectors();    // every operation of simd/vec_*.h
void check_narrow();     // numbers of 16 bits and codes in memory
void check_functions();  // exp2 and tanh against long double
void check_loops();      // the micro-kernel, packing and the scan for values that are not finite

}  // namespace selfattn::SELFATTN_ISA
