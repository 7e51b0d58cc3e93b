// Linear projection of float32 rows with bfloat16 weights that are packed in pairs. The weights are widened to float32
// and multiplied by FMA.
#pragma once
#include "kernels/project.h"

namespace selfattn::SELFATTN_ISA {

struct FloatPair {
  float first, second;
};
struct VecPair {
  VecF first, second;
};
inline VecPair broadcast(FloatPair x) { return {broadcast(x.first), broadcast(x.second)}; }

// Adds the products in the order of the depth, as FmaUnit does.
struct WidenedUnit {
  using Real = float;
  static constexpr int cell = 2;
  static VecF add_product(const VecPair& a, VecF cells, VecF sum) {
    return fma(a.second, second_of(cells), fma(a.first, first_of(cells), sum));
  }
};

}  // namespace selfattn::SELFATTN_ISA
