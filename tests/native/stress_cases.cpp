#include "stress_cases.h"

#include <cstring>

namespace selfattn::native {
namespace {

Array normal(DType dtype, Extents shape, std::uint64_t seed, const Layout& layout = {}) {
  Array array(dtype, std::move(shape), layout);
  Random random(seed);
  array.each([&](char* p) { store(p, dtype, random.real() * 1.5); });
  return array;
}

Array integers(Extents shape, const std::vector<std::int64_t>& values) {
  Array array(DType::i64, std::move(shape));
  std::size_t next = 0;
  array.each([&](char* p) { std::memcpy(p, &values[next++], sizeof values[0]); });
  return array;
}

struct Sizes {
  std::int64_t batch, heads, kv_heads, q_len, kv_len, dim;
};

Case make(const Sizes& s, DType queries, DType keys, const Layout& layout) {
  Case c;
  c.q = normal(queries, {s.batch, s.heads, s.q_len, s.dim}, 1, layout);
  c.k = normal(keys, {s.batch, s.kv_heads, s.kv_len, s.dim}, 2, layout);
  c.v = normal(keys, {s.batch, s.kv_heads, s.kv_len, s.dim}, 3, layout);
  c.out = layout;
  return c;
}

Case make(const Sizes& s, DType dtype = DType::f32, const Layout& layout = {}) { return make(s, dtype, dtype, layout); }

Case many_tasks() {
  Case c = make({2, 4, 4, 150, 150, 16});
  c.options.causal = true;
  c.lse = true;
  return c;
}

Case few_rows() {
  Case c = make({1, 2, 2, 14, 9000, 8}, DType::f64);
  c.lse = c.weights = true;
  return c;
}

Case decode_with_sinks() {
  Case c = make({2, 8, 2, 1, 9000, 8});
  c.sinks = normal(DType::f64, {8}, 4);
  c.alibi_slopes = normal(DType::f64, {2, 8}, 5);
  c.kv_lens = integers({2}, {9000, 4321});
  c.lse = true;
  return c;
}

Case ragged() {
  Case c = make({3, 4, 2, 70, 130, 16});
  c.mask = normal(DType::boolean, {3, 1, 70, 130}, 6);
  c.bias = normal(DType::f64, {4, 1, 130}, 7);
  c.q_lens = integers({3}, {70, 0, 33});
  c.kv_lens = integers({3}, {1, 130, 77});
  c.options.window_left = 40;
  c.options.softcap = 3;
  c.weights = true;
  return c;
}

Case copied() {  // none of queries, keys, values and out can be used in place
  return make({2, 4, 4, 120, 120, 16}, DType::f32, Layout{.order = {2, 3, 1, 0}, .gaps = {4, 8, 4, 4}});
}

Case narrow_prompt() {
  Case c = make({2, 4, 4, 150, 150, 16}, DType::bf16);
  c.options.causal = true;
  c.lse = true;
  return c;
}

Case narrow_decode() { return make({1, 8, 2, 1, 20000, 16}, DType::f16); }

Case narrow_keys() { return make({1, 2, 2, 14, 9000, 8}, DType::f32, DType::f16, {}); }

Case narrow_ragged() {
  Case c = make({3, 4, 2, 70, 130, 16}, DType::f16);
  c.mask = normal(DType::boolean, {3, 1, 70, 130}, 6);
  c.bias = normal(DType::bf16, {4, 1, 130}, 7);
  c.kv_lens = integers({3}, {1, 130, 77});
  c.weights = true;
  return c;
}

Case narrow_copied() {
  return make({2, 4, 4, 120, 120, 16}, DType::bf16, Layout{.order = {2, 3, 1, 0}, .gaps = {2, 4, 6, 2}});
}

}  // namespace

std::vector<StressCase> stress_cases() {
  std::vector<StressCase> all;
  const auto add = [&](const char* name, Keys keys, Case c) { all.push_back({name, keys, std::move(c)}); };
  add("many tasks", Keys::whole, many_tasks());
  add("decode", Keys::split, decode());
  add("few rows", Keys::split, few_rows());
  add("decode with sinks", Keys::split, decode_with_sinks());
  add("ragged", Keys::whole, ragged());
  add("copied", Keys::whole, copied());
  add("narrow prompt", Keys::whole, narrow_prompt());
  add("narrow decode", Keys::split, narrow_decode());
  add("narrow keys", Keys::split, narrow_keys());
  add("narrow ragged", Keys::whole, narrow_ragged());
  add("narrow, copied", Keys::whole, narrow_copied());
  return all;
}

Case decode() { return make({1, 2, 2, 1, 20000, 16}); }

Case endless() {
  const Layout repeated{.repeated = {false, true}};
  Case c;
  c.q = normal(DType::f32, {1, 512, 4000, 64}, 8, repeated);
  c.k = normal(DType::f32, {1, 512, 4000, 64}, 9, repeated);
  c.v = normal(DType::f32, {1, 512, 4000, 1}, 10, repeated);
  return c;
}

}  // namespace selfattn::native
