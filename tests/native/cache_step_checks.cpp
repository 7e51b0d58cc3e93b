// cache_step_checks: what a step on a cache reads, claims, writes and commits, and the state in which a failed step
// leaves the cache.
#include <cmath>
#include <cstring>

#include "check.h"
#include "held_cache.h"
#include "page_checks.h"
#include "stage_checks.h"

namespace selfattn::native {
namespace {

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

  test::begin_section("a step that is taken back after its commit");
  append(held.source(), tokens);
  SELFATTN_CHECK(held.holds(7, 4));
  held.ledger.undo();
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
  held.ledger.undo();
  SELFATTN_CHECK(held.holds(7, 20) && held.starts_at(2, 15));
  SELFATTN_CHECK(refuses([&] { append(held.source(), NewTokens(4)); }, "takes at most 3"));
}

void check_refusals() {
  test::begin_section("refusals");
  Held held(4);
  const auto appends = [&](std::int64_t count) { return [&, count] { append(held.source(), NewTokens(count)); }; };
  held.set(0, 7);
  SELFATTN_CHECK(refuses(appends(2), "sequence 1 holds 7 tokens, so that 2 more exceed the capacity 8"));
  held.set(-1, 0);
  SELFATTN_CHECK(refuses(appends(1), "append: the cache's buffer says that sequence 0 has the tokens 0 to -1"));
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

void check_truncate() {
  test::begin_section("fewer tokens");
  Held held;
  held.set(4, 6);
  const auto cut = [&](std::int64_t first, std::int64_t second) {
    return [&held, first, second] {
      const std::int64_t lengths[] = {first, second};
      CacheStep("truncate", held.source(), 0).truncate("truncate", lengths);
    };
  };
  cut(3, 0)();
  SELFATTN_CHECK(held.active == 1 && held.holds(3, 0));
  SELFATTN_CHECK(refuses(cut(3, 1), "truncate: lengths holds 1, which is outside 0..0 (sequence 1)"));
  SELFATTN_CHECK(refuses(cut(-1, 0), "lengths holds -1, which is outside 0..3 (sequence 0)"));
  held.store.window = 5;
  held.set(9, 20);
  held.copies[2] = held.copies[6] = 3, held.copies[3] = held.copies[7] = 12;
  SELFATTN_CHECK(refuses(cut(9, 16), "holds 16, but a window of 5 would then see tokens before 12, which sequence 1"));
  SELFATTN_CHECK(held.active == 1 && held.holds(9, 20));
  cut(0, 17)();
  SELFATTN_CHECK(held.holds(0, 17) && held.starts_at(0, 12));
  const std::int64_t lengths[] = {8, 13}, starts[] = {1, 7};
  CacheStep("set", held.source(), 0).set(lengths, starts);
  SELFATTN_CHECK(held.holds(8, 13) && held.starts_at(1, 7));
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
      attend_over(held.source(), {q.view(), {}, {}, {}, {}}, left);
    };
  };
  reads(1, 5)();
  reads(2, 4)();
  SELFATTN_CHECK(
      refuses(reads(1, 6), "window is 6 to the left, but the cache keeps only the tokens that a window of 5 sees"));
  SELFATTN_CHECK(refuses(reads(1, -1), "window is none"));
  SELFATTN_CHECK(refuses(reads(2, 5), "2 queries for stored tokens, and the first would see tokens before 3"));

  test::begin_section("a layer's tokens in a ring");
  const auto layer = [&held](std::int64_t left) { return [&held, left] { run_layer(held.source(), left); }; };
  SELFATTN_CHECK(refuses(layer(6), "window is 6 to the left"));
  layer(5)();
  SELFATTN_CHECK(held.holds(11, 22) && held.starts_at(3, 14));
  held.copies[2] = held.copies[6] = 9;  // by another process
  SELFATTN_CHECK(refuses(layer(5), "the first would see tokens before 9, which sequence 0 no longer holds"));
  SELFATTN_CHECK(held.holds(11, 22));
}

void check_rotation() {
  test::begin_section("rotation, by a call and before it");
  const double frequencies[] = {1, 0.1};
  const Rope rope{.rotary_dim = 4, .frequencies = frequencies};
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
  const Array found = attend_over(one.source(), {q.view(), tokens.k.view(), tokens.v.view(), {}, rope});
  const Array expected = attend_over(other.source(), {rotated_q.view(), rotated_k.view(), tokens.v.view(), {}, {}});
  SELFATTN_CHECK(found.bytes() == expected.bytes() && one.k.bytes() == other.k.bytes());
  SELFATTN_CHECK(one.holds(5, 8) && other.holds(5, 8));

  test::begin_section("rotation by many threads");
  const Array many = numbers({3, 500, 2, 64}, 6);
  Array by_one = numbers(many.shape(), 0), by_three = numbers(many.shape(), 0);
  std::vector<double> all;
  for (int i = 0; i < 32; ++i) all.push_back(std::pow(10000.0, -i / 32.0));
  const Rope wide{.rotary_dim = 64, .interleaved = true, .frequencies = all.data()};
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
  native::check_pool();
  native::check_refusals();
  native::check_reorder();
  native::check_truncate();
  native::check_every_stage();
  native::check_window();
  native::check_rotation();
  return test::finish("cache_step_checks");
}
