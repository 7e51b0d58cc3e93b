// The only file that names every ISA.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "kernels/kernel_set.h"

namespace selfattn {

// Every kernel set of this build, best first.
std::span<const KernelSet* const> compiled_kernels();

// Those that this machine can run, best first.
const std::vector<const KernelSet*>& available_kernels();

// The set in use: SELFATTN_ISA's, else the best. Throws std::invalid_argument if SELFATTN_ISA names none of them.
const KernelSet& active_kernels();

// Puts another set in use, for the whole process.
void select_kernels(const std::string& name);

const KernelSet& kernels_named(const std::string& name);

}  // namespace selfattn
