// cache_step_checks: what a step on a cache reads, claims, writes and commits, and the state in which a failed step
// leaves the cache.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "cache_call.h"
#include "check.h"
#include "registry.h"

namespace selfattn::native {
namespace {

constexpr std::int64_t batch = 2, heads = 2, slots = 8, key_width = 4, value_width = 3;

Array numbers(Extents shape, std::uint64_t seed) {
  Array array(DType::f32, std::move(shape));
  Random random(seed);
  array.each([&](char* p) { store(p, DType::f32, random.real()); });
  return array;
}

TokenRows rows_of(const Array& array) {
  const TensorView view = array.view();
  return {static_cast<char*>(view.data), view.strides[0], view.strides[1], view.strides[2], 0};
}

// A cache of some pages, with -1 in every slot, and a ledger for the first two pages.
struct Held {
  Array k, v;
  std::int64_t active = 0;
  std::array<std::int64_t, 4 * batch> copies{};
  CacheStore store;
  Ledger ledger{&active, copies.data()};

  explicit Held(std::int64_t pages = batch)
      : k(DType::f32, {pages, heads, slots, key_width}), v(DType::f32, {pages, heads, slots, value_width}) {
    for (const Array* array : {&k, &v}) array->each([](char* p) { native::store(p, DType::f32, -1); });
    store = {DType::f32, pages, heads, slots, {rows_of(k), {}, key_width}, {rows_of(v), {}, value_width}};
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  CacheSource source() const { return {&store, &ledger, nullptr, batch}; }
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
  explicit NewTokens(std::int64_t count, std::int64_t sequences = batch)
      : k(numbers({sequences, count, heads, key_width}, 1)), v(numbers({sequences, count, heads, value_width}, 2)) {}
};

void append(const CacheSource& source, const NewTokens& tokens, const std::function<void()>& then = [] {}) {
  const CacheStep step("append", source, tokens.k.shape()[1]);
  step.run([&] {
    step.store(active_kernels(), tokens.k.view(), tokens.v.view());
    then();
  });
}

void fail() { throw std::runtime_error("failed"); }

bool refuses(const std::function<void()>& call, const std::string& reason) {
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

void check_ledger() {
  test::begin_section("one page for each sequence");
  Held held;
  held.set(3, 0);
  const NewTokens tokens(2);
  append(held.source(), tokens);
  SELFATTN_CHECK(held.active == 1 && held.holds(5, 2) && held.starts_at(0, 0));
  SELFATTN_CHECK(held.copies[0] == 3 && held.copies[1] == 0);  // the other copy of the lengths is unchanged
  for (std::int64_t t = 0; t < 2; ++t)
    SELFATTN_CHECK(held.has(0, 3 + t, tokens.k, 0, t) && held.has(1, t, tokens.k, 1, t));

  test::begin_section("a step that fails");
  SELFATTN_CHECK(fails([&] { append(held.source(), tokens, fail); }));
  SELFATTN_CHECK(held.active == 1 && held.holds(5, 2));

  test::begin_section("a step that only reads");
  CacheStep reading("attend", held.source(), 0);
  reading.run([] {});
  SELFATTN_CHECK(held.active == 1 && reading.lengths_after()[0] == 5 && reading.lengths_after()[1] == 2);

  test::begin_section("lengths that change after they were copied");
  append(held.source(), tokens, [&] { held.set(1 << 20, -7); });
  SELFATTN_CHECK(held.holds(7, 4));
}

void check_ring() {
  test::begin_section("a ring");
  Held held;
  held.store.window = 5;
  held.set(7, 20);
  held.copies[3] = held.copies[7] = 12;
  const NewTokens tokens(3);
  SELFATTN_CHECK(fails([&] { append(held.source(), tokens, fail); }));
  SELFATTN_CHECK(held.holds(7, 20) && held.starts_at(2, 15));  // only the tokens that were to be overwritten are lost
  append(held.source(), tokens);
  SELFATTN_CHECK(held.holds(10, 23) && held.starts_at(2, 15));
  SELFATTN_CHECK(held.has(0, 7, tokens.k, 0, 0) && held.has(0, 0, tokens.k, 0, 1) &&
                 held.has(1, 22 % slots, tokens.k, 1, 2));
  SELFATTN_CHECK(refuses([&] { append(held.source(), NewTokens(4)); }, "takes at most 3"));
}

void check_pages() {
  test::begin_section("pages");
  Held held(4);
  const std::int32_t first[] = {2, 0}, second[] = {3};
  std::int64_t lengths[] = {7, 17};
  const PagedSequence sequences[] = {{first, 2, 0, lengths}, {second, 1, 16, lengths + 1}};
  const CacheSource source{&held.store, nullptr, sequences, batch};
  const NewTokens tokens(2);
  append(source, tokens);
  SELFATTN_CHECK(lengths[0] == 9 && lengths[1] == 19);
  SELFATTN_CHECK(held.has(2, 7, tokens.k, 0, 0) && held.has(0, 0, tokens.k, 0, 1));
  SELFATTN_CHECK(held.has(3, 1, tokens.k, 1, 0) && held.has(3, 2, tokens.k, 1, 1));
  CacheStep step("attend", source, 2);
  SELFATTN_CHECK(step.lengths_after()[0] == 11 && step.lengths_after()[1] == 21 && step.cache().starts);

  test::begin_section("a step on pages that fails");
  SELFATTN_CHECK(fails([&] { append(source, tokens, fail); }));
  SELFATTN_CHECK(lengths[0] == 9 && lengths[1] == 19);

  test::begin_section("pages that are not read");
  CacheSource later = source;
  later.skipped = slots;
  CacheStep reading("attend", later, 0);
  const Pages::Row& row = reading.cache().pages.rows[0];
  SELFATTN_CHECK(row.numbers == first + 1 && row.first == 1 &&
                 integer_at(static_cast<const char*>(reading.cache().starts.data)) == slots);
}

void check_refusals() {
  test::begin_section("refusals");
  Held held(4);
  const auto appends = [&](std::int64_t count) { return [&, count] { append(held.source(), NewTokens(count)); }; };
  held.set(0, 7);
  SELFATTN_CHECK(refuses(appends(2), "sequence 1 holds 7 tokens, so that 2 more exceed the capacity 8"));
  held.set(-1, 0);
  SELFATTN_CHECK(refuses(appends(1), "append: the cache's buffer says that sequence 0 has the tokens 0 to -1"));
  const auto paged = [&](const std::int32_t* numbers, std::int64_t count, std::int64_t start, std::int64_t length) {
    return [=, &held]() mutable {
      const PagedSequence sequence{numbers, count, start, &length};
      append({&held.store, nullptr, &sequence, 1}, NewTokens(2, 1));
    };
  };
  const std::int32_t pages[] = {1, 4}, negative[] = {-1};
  SELFATTN_CHECK(refuses(paged(pages, 1, 0, 7), "the pages of sequence 0 do not fit its length"));
  SELFATTN_CHECK(refuses(paged(pages, 2, 0, 7), "hold a number outside 0..3"));
  SELFATTN_CHECK(refuses(paged(negative, 1, 0, 0), "hold a number outside 0..3"));
  SELFATTN_CHECK(refuses(paged(pages, 2, 3, 2), "has the tokens 3 to 2, which is impossible"));
  SELFATTN_CHECK(held.untouched() && held.active == 0);
}

void check_reorder() {
  test::begin_section("another order");
  Held held;
  const NewTokens tokens(2);
  append(held.source(), tokens);
  held.set(1, 2);
  const std::int64_t index[] = {1, 0};
  CacheStep("reorder", held.source(), 0).reorder(index);
  SELFATTN_CHECK(held.holds(2, 1) && held.has(0, 1, tokens.k, 1, 1) && held.has(1, 0, tokens.k, 0, 0));
}

// Attention over a cache; q, k and v are (batch, tokens, heads, width).
Array attend_over(Held& held, const CacheInputs& inputs, std::int64_t left = -1) {
  Array out(DType::f32, {batch, inputs.q.extent(2), heads, value_width});
  CacheStep step("attend", held.source(), inputs.k ? inputs.q.extent(2) : 0);
  AttentionArguments arguments;
  arguments.layout = selfattn::Layout::bshd;
  arguments.causal = true;
  arguments.window_left = left;
  CacheCall call(step, inputs, arguments);
  attach_out(call.problem(), out.view());
  const Plan plan = make_plan(call.problem(), active_kernels());
  step.run([&] { SELFATTN_CHECK(call.run(plan, 1, nullptr)); });
  return out;
}

void check_window() {
  test::begin_section("queries of a ring");
  Held held;
  held.store.window = 5;
  held.set(9, 20);
  held.copies[2] = held.copies[6] = 3, held.copies[3] = held.copies[7] = 12;
  const auto reads = [&](std::int64_t count, std::int64_t left) {
    return [&held, count, left] {
      const Array q = numbers({batch, count, heads, key_width}, 5);
      attend_over(held, {q.view(), {}, {}, {}, {}}, left);
    };
  };
  reads(1, 5)();
  reads(2, 4)();
  SELFATTN_CHECK(
      refuses(reads(1, 6), "window is 6 to the left, but the cache keeps only the tokens that a window of 5 sees"));
  SELFATTN_CHECK(refuses(reads(1, -1), "window is none"));
  SELFATTN_CHECK(refuses(reads(2, 5), "2 queries for stored tokens, and the first would see tokens before 3"));
}

void check_rotation() {
  test::begin_section("rotation, by a call and before it");
  const Rope rope{100, 4, false};
  const Array q = numbers({batch, 3, heads, key_width}, 5);
  const NewTokens tokens(3);
  Array positions(DType::i64, {batch, 3});  // after 2 tokens of one sequence and 5 of the other
  const std::int64_t places[] = {2, 3, 4, 5, 6, 7};
  for (std::int64_t i = 0; i < 6; ++i) std::memcpy(positions.at(i), &places[i], sizeof places[i]);
  Array rotated_q = numbers({batch, 3, heads, key_width}, 0), rotated_k = numbers({batch, 3, heads, key_width}, 0);
  const Rotation parts[] = {{q.view(), rotated_q.view(), positions.view()},
                            {tokens.k.view(), rotated_k.view(), positions.view()}};
  SELFATTN_CHECK(rotate(rope, parts, 2, 1, nullptr));
  SELFATTN_CHECK(rotated_k.bytes() != tokens.k.bytes());

  Held one, other;
  for (Held* held : {&one, &other}) held->set(2, 5);
  const Array found = attend_over(one, {q.view(), tokens.k.view(), tokens.v.view(), {}, rope});
  const Array expected = attend_over(other, {rotated_q.view(), rotated_k.view(), tokens.v.view(), {}, {}});
  SELFATTN_CHECK(found.bytes() == expected.bytes() && one.k.bytes() == other.k.bytes());
  SELFATTN_CHECK(one.holds(5, 8) && other.holds(5, 8));

  test::begin_section("rotation by many threads");
  const Array many = numbers({3, 500, 2, 64}, 6);
  Array by_one = numbers(many.shape(), 0), by_three = numbers(many.shape(), 0);
  const Rope wide{10000, 64, true};
  const Rotation alone{many.view(), by_one.view(), {}}, together{many.view(), by_three.view(), {}};
  SELFATTN_CHECK(rotate(wide, &alone, 1, 1, nullptr) && rotate(wide, &together, 1, 3, nullptr));
  SELFATTN_CHECK(by_one.bytes() == by_three.bytes());
}

}  // namespace
}  // namespace selfattn::native

int main() {
  using namespace selfattn;
  test::report_faults();
  native::check_ledger();
  native::check_ring();
  native::check_pages();
  native::check_refusals();
  native::check_reorder();
  native::check_window();
  native::check_rotation();
  return test::finish("cache_step_checks");
}
