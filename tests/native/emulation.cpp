// emulation: the processor's AMX tiles and emulated tiles give bit-identical results. Other tests check the accuracy of
// emulated results.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "attend_case.h"
#include "registry.h"

using namespace selfattn;
using namespace selfattn::native;

namespace {

constexpr int skipped = 77;

const KernelSet* set_named(const char* name) {
  const auto& sets = available_kernels();
  const auto found = std::find_if(sets.begin(), sets.end(),
                                  [name](const KernelSet* set) { return std::strcmp(set->name, name) == 0; });
  return found == sets.end() ? nullptr : *found;
}

Array numbers(Random& random, DType dtype, Extents shape, bool odd) {
  Array array(dtype, std::move(shape));
  constexpr double infinity = std::numeric_limits<double>::infinity();
  constexpr double rare[] = {infinity, -infinity, std::numeric_limits<double>::quiet_NaN(), 3.4e38, 1e-39, 0.0};
  array.each(
      [&](char* p) { store(p, dtype, odd && random.below(400) == 0 ? rare[random.below(6)] : 3 * random.real()); });
  return array;
}

Case draw(Random& random, DType dtype, Precision precision) {
  constexpr std::int64_t sizes[] = {1, 8, 17, 31, 32, 33, 64, 80};
  const auto size = [&] { return sizes[random.below(8)]; };
  const std::int64_t heads = 1 + random.below(3), q_len = 20 + random.below(90), kv_len = 1 + random.below(300);
  const std::int64_t head_dim = size(), value_dim = size();
  const bool odd = random.below(3) == 0;
  Case c;
  c.q = numbers(random, dtype, {1, heads, q_len, head_dim}, odd);
  c.k = numbers(random, dtype, {1, 1, kv_len, head_dim}, odd);
  c.v = numbers(random, dtype, {1, 1, kv_len, value_dim}, odd);
  if (random.below(3) == 0) {
    c.mask = Array(DType::boolean, {q_len, kv_len});
    c.mask.each([&](char* p) { *p = static_cast<char>(random.below(4) != 0); });
  }
  c.options.precision = precision;
  c.options.causal = random.below(2) == 0;
  if (random.below(3) == 0) c.options.window_left = random.below(100);
  if (random.below(4) == 0) c.options.softcap = 20;
  c.lse = true;
  c.weights = random.below(2) == 0;
  return c;
}

// Whether results are bit-identical, except for the bits of NaN, which AMX does not specify.
bool agree(const Array& a, const Array& b) {
  if (a.count() != b.count()) return false;
  for (std::int64_t i = 0; i < a.count(); ++i) {
    const double x = a.number(i), y = b.number(i);
    if (std::isnan(x) ? !std::isnan(y) : x != y || std::signbit(x) != std::signbit(y)) return false;
  }
  return true;
}

bool agree(const Results& a, const Results& b) {
  return agree(a.out, b.out) && agree(a.lse, b.lse) && (!a.weights || agree(a.weights, b.weights));
}

// Whether projections of the same numbers with both sets agree.
bool projections_agree(Random& random, const KernelSet& one, const KernelSet& other) {
  const std::int64_t rows = 1 + random.below(70), cells = 1 + random.below(60), columns = 1 + random.below(48);
  const std::int64_t whole = (cells + 15) / 16 * 16, width = one.f32.panel_columns;
  const Array x = numbers(random, DType::bf16, {rows, 2 * cells}, false);
  const Array panel = numbers(random, DType::bf16, {whole, 2 * width}, false);
  const Array bias = numbers(random, DType::f32, {width}, false);
  const auto project = [&](const KernelSet& set) {
    Array out(DType::f32, {rows, width});
    out.each([](char* p) { store(p, DType::f32, 7); });
    set.matrix.project_bf16(
        {x.at(0), 2 * cells, rows, 2 * cells, panel.at(0), bias.at(0), out.at(0), width, static_cast<int>(columns)});
    return out;
  };
  return agree(project(one), project(other));
}

}  // namespace

int main() {
  const KernelSet* processor = set_named("amx");
  const KernelSet* emulation = set_named("amx_emulated");
  if (!processor || !emulation) {
    std::puts("skipped: this machine has no AMX, or this build no emulation of it");
    return skipped;
  }
  constexpr struct {
    DType dtype;
    Precision precision;
  } modes[] = {{DType::bf16, Precision::highest},
               {DType::f16, Precision::highest},
               {DType::f32, Precision::high},
               {DType::f32, Precision::medium}};
  constexpr int rounds = 25;
  int failed = 0, matrix = 0;
  Random random(1);
  for (int round = 0; round < rounds; ++round)
    for (const auto& mode : modes) {
      const Case c = draw(random, mode.dtype, mode.precision);
      const Results one = compute(c, *processor, 1), other = compute(c, *emulation, 1),
                    team = compute(c, *processor, 3);
      matrix += std::strcmp(one.plan.attend->unit, "amx") == 0 ? 1 : 0;
      if (agree(one, other) && agree(one, team)) continue;
      ++failed;
      std::printf("round %d, type %d, precision %d: results differ\n", round, static_cast<int>(mode.dtype),
                  static_cast<int>(mode.precision));
    }
  for (int round = 0; round < rounds; ++round)
    if (!projections_agree(random, *processor, *emulation)) {
      ++failed;
      std::printf("projection %d: results differ\n", round);
    }
  std::printf("emulation: %d calls, %d on tiles, %d failed\n", rounds * 4, matrix, failed);
  return failed == 0 && matrix > rounds * 3 ? 0 : 1;
}
