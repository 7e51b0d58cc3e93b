// The list of kernel sets. registry.cpp is the only C++ file that names every ISA.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "kernels/kernel_set.h"

namespace selfattn {

// All kernel sets of this build, best first.
std::span<const KernelSet* const> compiled_kernels();

// The kernel sets that this machine can run, best first.
const std::vector<const KernelSet*>& available_kernels();

// The set in use: the set that select_kernels() selected. If none was selected, the set that SELFATTN_ISA names, or the
// default if SELFATTN_ISA is not set. Throws std::invalid_argument if SELFATTN_ISA names none of the available sets.
const KernelSet& active_kernels();

// Selects another set for the whole process.
void select_kernels(const std::string& name);

const KernelSet& kernels_named(const std::string& name);

}  // namespace selfattn
