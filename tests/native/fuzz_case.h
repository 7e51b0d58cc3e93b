// Turns the bytes of a fuzzer into an attention call.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cached_case.h"

namespace selfattn::native {

struct Described {
  Case input;
  bool valid = true;         // must be accepted; otherwise it may also be refused
  bool computable = true;    // small enough to compute; otherwise only planned
  bool well_behaved = true;  // all numbers finite and moderate
  bool cached = false;       // also computed from a cache, if one can hold its keys
  Store store;
  const KernelSet* kernels = nullptr;
  int threads = 2;
};

Described describe(const std::uint8_t* data, std::size_t size);

}  // namespace selfattn::native
