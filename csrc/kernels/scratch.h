// Divides one allocation into aligned pieces. If the base is null, it only counts bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "arithmetic.h"

namespace selfattn::SELFATTN_ISA {

struct Carver {
  char* base;
  std::size_t used = 0;

  template <class T>
  T* take(std::int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += whole_lines(static_cast<std::size_t>(count) * sizeof(T));
    return piece;
  }
};

}  // namespace selfattn::SELFATTN_ISA
