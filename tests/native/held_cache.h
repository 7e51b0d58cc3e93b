// A small cache for tests of its steps.
#pragma once
#include <array>
#include <functional>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "cache_step.h"
#include "registry.h"

namespace selfattn::native {

constexpr std::int64_t batch = 2, heads = 2, slots = 8, key_width = 4, value_width = 3;

inline Array numbers(Extents shape, std::uint64_t seed) {
  Array array(DType::f32, std::move(shape));
  Random random(seed);
  array.each([&](char* p) { store(p, DType::f32, random.real()); });
  return array;
}

inline TokenRows rows_of(const Array& array) {
  const TensorView view = array.view();
  return {static_cast<char*>(view.data), view.strides[0], view.strides[1], view.strides[2], 0};
}

// A cache of some pages, with -1 in every slot, and a ledger for the first two pages.
struct Held {
  Array k, v;
  std::int64_t active = 0;
  std::array<std::int64_t, 4 * batch> copies{};
  CacheStore store;
  Ledger ledger{&active, copies.data(), batch};

  explicit Held(std::int64_t pages = batch)
      : k(DType::f32, {pages, heads, slots, key_width}), v(DType::f32, {pages, heads, slots, value_width}) {
    for (const Array* array : {&k, &v}) array->each([](char* p) { native::store(p, DType::f32, -1); });
    store = {DType::f32, pages, heads, slots, {rows_of(k), {}, key_width}, {rows_of(v), {}, value_width}};
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  CacheSource source() const { return {&store, &ledger, nullptr, batch}; }
  CacheSource source(PageChanges& pages) const {
    return {&store, nullptr, &pages, static_cast<std::int64_t>(pages.sequences().size())};
  }
  void set(std::int64_t first, std::int64_t second) {
    for (std::int64_t* copy : {copies.data(), copies.data() + 2 * batch}) copy[0] = first, copy[1] = second;
  }
  const std::int64_t* in_force() const { return copies.data() + active * 2 * batch; }
  bool holds(std::int64_t first, std::int64_t second) const {
    return in_force()[0] == first && in_force()[1] == second;
  }
  bool starts_at(std::int64_t first, std::int64_t second) const {
    return in_force()[2] == first && in_force()[3] == second;
  }
  // Whether a slot of a page holds token `t` of sequence `b` of the new tokens.
  bool has(std::int64_t page, std::int64_t slot, const Array& tokens, std::int64_t b, std::int64_t t) const {
    bool same = true;
    for (std::int64_t head = 0; head < heads; ++head)
      for (std::int64_t i = 0; i < key_width; ++i)
        same = same && k.number(((page * heads + head) * slots + slot) * key_width + i) ==
                           tokens.number(((b * tokens.shape()[1] + t) * heads + head) * key_width + i);
    return same;
  }
  bool untouched() const {
    bool same = true;
    k.each([&](const char* p) { same = same && load(p, DType::f32) == -1; });
    v.each([&](const char* p) { same = same && load(p, DType::f32) == -1; });
    return same;
  }
};

// New tokens (batch, tokens, heads, width).
struct NewTokens {
  Array k, v;
  explicit NewTokens(std::int64_t count, std::int64_t sequences = batch, std::uint64_t seed = 1)
      : k(numbers({sequences, count, heads, key_width}, seed)),
        v(numbers({sequences, count, heads, value_width}, seed + 1)) {}
};

inline void append(const CacheSource& source, const NewTokens& tokens, const std::function<void()>& then = [] {}) {
  const CacheStep step("append", source, tokens.k.shape()[1]);
  step.run([&] {
    step.store(active_kernels(), tokens.k.view(), tokens.v.view());
    then();
  });
}

inline void fail() { throw std::runtime_error("failed"); }

inline bool refuses(const std::function<void()>& call, const std::string& reason) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return std::string(error.what()).find(reason) != std::string::npos;
  }
  return false;
}

template <class F>
bool fails(F call) {
  try {
    call();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace selfattn::native
