#include "page_checks.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "held_cache.h"
#include "page_growth.h"

namespace selfattn::native {
namespace {

using Numbers = std::vector<std::int32_t>;
using Ids = std::vector<std::int64_t>;

// What a pool holds: its rows, and all else as it follows from them.
struct Contents {
  PagePool::Rows rows;
  Numbers free;
  std::vector<std::int64_t> sharers;

  explicit Contents(const PagePool& pool) : rows(pool.rows()), free(pool.free_pages()) {
    for (auto& [id, row] : rows) row.pages.resize(static_cast<std::size_t>(pool.count(row)));
    std::sort(free.begin(), free.end());
  }
  bool operator==(const Contents& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.first == b.first && a.second.pages == b.second.pages && a.second.start == b.second.start &&
             a.second.length == b.second.length;
    };
    return free == other.free && sharers == other.sharers &&
           std::equal(rows.begin(), rows.end(), other.rows.begin(), other.rows.end(), same);
  }
};

Contents contents(const PagePool& pool, std::int64_t pages) {
  Contents found(pool);
  for (std::int32_t page = 0; page < pages; ++page) found.sharers.push_back(pool.sharers(page));
  return found;
}

// A cache of pages that a pool manages.
struct Pooled {
  std::int64_t count;
  Held held;
  PagePool pool;
  PageGrowth growth{pool};

  explicit Pooled(std::int64_t pages, std::int64_t window = -1) : count(pages), held(pages), pool(pages, slots) {
    held.store.window = window;
  }
  Contents now() const { return contents(pool, count); }
  const PagePool::Row& row(std::int64_t id) { return pool.row("row", id); }
  bool is_sound() {
    const Contents before = now();
    pool.recount();
    return before == now();
  }
  // Appends tokens and returns what takes the step back. One object serves all calls, as in a cache.
  PageChanges& append(const Ids& ids, const NewTokens& tokens, const std::function<void()>& then = [] {}) {
    growth.begin({"append", ids, tokens.k.shape()[1], held.store.window});
    native::append(held.source(growth), tokens, then);
    return growth;
  }
  bool has(std::int64_t id, std::int64_t token, const NewTokens& tokens, std::int64_t b, std::int64_t t) {
    const PagePool::Row& at = row(id);
    return held.has(at.pages[static_cast<std::size_t>((token - at.start) / slots)], token % slots, tokens.k, b, t);
  }
};

void check_shared_pages() {
  test::begin_section("a pool");
  Pooled cache(4);
  const std::int64_t first = cache.pool.add();
  const NewTokens ten(10, 1), two(2, 1, 3);
  cache.append({first}, ten);
  SELFATTN_CHECK(cache.row(first).pages == (Numbers{0, 1}) && cache.row(first).length == 10);
  SELFATTN_CHECK(cache.has(first, 9, ten, 0, 9) && cache.pool.free_pages() == (Numbers{3, 2}));

  test::begin_section("a step that writes to a shared page");
  const std::int64_t twin = cache.pool.fork("fork", first);
  const Contents forked = cache.now();
  SELFATTN_CHECK(fails([&] { cache.append({twin}, two, fail); }) && cache.now() == forked);
  PageChanges& step = cache.append({twin}, two);
  SELFATTN_CHECK(cache.row(twin).pages == (Numbers{0, 2}) && cache.row(twin).length == 12);
  SELFATTN_CHECK(cache.has(twin, 9, ten, 0, 9) && cache.has(twin, 10, two, 0, 0) && cache.pool.sharers(0) == 2);
  SELFATTN_CHECK(cache.row(first).pages == (Numbers{0, 1}) && cache.row(first).length == 10 && cache.is_sound());
  step.undo();
  SELFATTN_CHECK(cache.now() == forked && cache.has(twin, 9, ten, 0, 9));

  test::begin_section("the last row to hold a shared page writes to it in place");
  cache.pool.truncate("truncate", twin, 9, -1);
  cache.append({first, twin}, NewTokens(2));
  SELFATTN_CHECK(cache.row(first).pages == (Numbers{0, 1}) && cache.row(twin).pages == (Numbers{0, 2}));
  SELFATTN_CHECK(cache.row(first).length == 12 && cache.row(twin).length == 11 && cache.is_sound());

  test::begin_section("rows that end or become shorter");
  cache.pool.truncate("truncate", twin, 8, -1);
  SELFATTN_CHECK(cache.row(twin).pages == (Numbers{0}) && cache.pool.free_pages() == (Numbers{3, 2}));
  cache.pool.remove("free", first);
  SELFATTN_CHECK(cache.pool.sharers(0) == 1 && cache.pool.free_pages().size() == 3 && cache.is_sound());
  SELFATTN_CHECK(cache.pool.add() == 2 && cache.pool.next_id() == 3);
}

void check_reused_pages() {
  test::begin_section("a step that overwrites pages out of sight");
  Pooled cache(3, 5);
  const std::int64_t id = cache.pool.add();
  const NewTokens many(24, 1), more(9, 1, 3);
  cache.append({id}, many);
  const Contents before = cache.now();
  const std::vector<char> keys = cache.held.k.bytes(), values = cache.held.v.bytes();
  const auto unchanged = [&] {
    return cache.now() == before && cache.held.k.bytes() == keys && cache.held.v.bytes() == values;
  };
  SELFATTN_CHECK(fails([&] { cache.append({id}, more, fail); }) && unchanged());
  PageChanges& step = cache.append({id}, more);
  SELFATTN_CHECK(cache.row(id).pages == (Numbers{2, 0, 1}) && cache.row(id).start == 16 && cache.row(id).length == 33);
  SELFATTN_CHECK(cache.has(id, 23, many, 0, 23) && cache.has(id, 32, more, 0, 8) && cache.is_sound());
  SELFATTN_CHECK(cache.held.k.bytes() != keys);
  step.undo();
  SELFATTN_CHECK(unchanged());
  SELFATTN_CHECK(refuses([&] { cache.pool.truncate("truncate", id, 25, 5); }, "length is 25, which is outside 0..24"));

  test::begin_section("a step after one that overwrote pages");
  cache.append({id}, more);
  SELFATTN_CHECK(fails([&] { cache.append({id}, NewTokens(1, 1), fail); }) && cache.has(id, 32, more, 0, 8));
  cache.append({id}, NewTokens(1, 1)).undo();
  SELFATTN_CHECK(cache.has(id, 32, more, 0, 8));
}

bool lacks_memory(const std::function<void()>& call, const std::string& reason) {
  try {
    call();
  } catch (const MemoryRefusal& error) {
    return error.what() == reason;
  }
  return false;
}

void check_refused_growth() {
  test::begin_section("steps that a pool refuses");
  Pooled cache(3);
  const std::int64_t a = cache.pool.add(), b = cache.pool.add();
  cache.append({a, b}, NewTokens(3));
  const Contents before = cache.now();
  SELFATTN_CHECK(
      lacks_memory([&] { cache.append({a, b}, NewTokens(6)); }, "append: 2 pages are needed, but 1 are free"));
  SELFATTN_CHECK(refuses([&] { cache.append({a, a}, NewTokens(1)); }, "append: sequences holds 0 twice"));
  SELFATTN_CHECK(refuses([&] { cache.append({a, 7}, NewTokens(1)); }, "append: sequence 7 is not live"));
  SELFATTN_CHECK(refuses([&] { cache.pool.fork("fork", -1); }, "fork: sequence -1 is not live"));
  for (const Numbers& pages : {Numbers{}, Numbers{0, 0}, Numbers{0, 3}, Numbers{-1, 0}})
    SELFATTN_CHECK(!cache.pool.put(5, {pages, 0, 9}));
  SELFATTN_CHECK(!cache.pool.put(5, {{0}, 1, 8}) && !cache.pool.put(a, {{2}, 0, 8}) && cache.now() == before);
}

void check_memory_of_rows() {
  test::begin_section("rows are as long as the pages that they hold");
  Pooled cache(200);
  const std::int64_t id = cache.pool.add();
  cache.append({id}, NewTokens(200 * slots, 1));
  cache.pool.truncate("truncate", id, 3, -1);
  SELFATTN_CHECK(cache.row(id).pages.capacity() < 10);
  for (int i = 0; i < 3; ++i) fails([&] { cache.append({id}, NewTokens(100, 1), fail); });
  SELFATTN_CHECK(cache.row(id).pages.size() < 15);

  Pooled windowed(4, 1);
  const std::int64_t other = windowed.pool.add();
  for (int i = 0; i < 50; ++i) windowed.append({other}, NewTokens(3, 1));
  SELFATTN_CHECK(windowed.row(other).length == 150 && windowed.row(other).pages.size() < 4);
}

// Any steps, of which many fail or are taken back: counts and free pages always follow from the rows.
void check_any_order() {
  test::begin_section("any order of calls on a pool");
  Random random(7);
  for (const std::int64_t window : {-1, 0, 6}) {
    Pooled cache(6, window);
    for (int call = 0; call < 600; ++call) {
      const PagePool::Rows& rows = cache.pool.rows();
      const auto any = [&] {
        return std::next(rows.begin(), random.below(static_cast<std::int64_t>(rows.size())))->first;
      };
      const Contents before = cache.now();
      bool changes = true;
      try {
        const std::int64_t kind = rows.empty() ? 0 : random.below(9);
        if (kind == 0) cache.pool.add();
        if (kind == 1) cache.pool.fork("fork", any());
        if (kind == 2) cache.pool.remove("free", any());
        if (kind == 3) cache.pool.truncate("truncate", any(), random.below(20), window);
        if (kind > 3) {
          Ids ids{any()};
          if (const std::int64_t other = any(); other != ids[0]) ids.push_back(other);
          const NewTokens tokens(1 + random.below(9), static_cast<std::int64_t>(ids.size()));
          PageChanges& step = cache.append(ids, tokens, kind == 4 ? fail : [] {});
          changes = kind != 5;
          if (!changes) step.undo();
        }
      } catch (const std::exception&) {
        changes = false;
      }
      if (!changes) SELFATTN_CHECK(cache.now() == before);
      SELFATTN_CHECK(cache.is_sound());
    }
  }
}

}  // namespace

void check_pages() {
  test::begin_section("pages");
  Held held(4);
  const std::int32_t first[] = {2, 0}, second[] = {3};
  std::int64_t lengths[] = {7, 17};
  const NewTokens tokens(2);
  const auto pages = [&](std::int64_t more) {
    return PageChanges({{first, 2, 0, lengths}, {second, 1, 16, lengths + 1}}, more);
  };
  PageChanges appending = pages(2);
  append(held.source(appending), tokens);
  SELFATTN_CHECK(lengths[0] == 9 && lengths[1] == 19);
  SELFATTN_CHECK(held.has(2, 7, tokens.k, 0, 0) && held.has(0, 0, tokens.k, 0, 1));
  SELFATTN_CHECK(held.has(3, 1, tokens.k, 1, 0) && held.has(3, 2, tokens.k, 1, 1));
  appending.undo();
  SELFATTN_CHECK(lengths[0] == 7 && lengths[1] == 17 && held.untouched());
  CacheStep step("attend", held.source(appending), 2);
  SELFATTN_CHECK(step.lengths_after()[0] == 9 && step.lengths_after()[1] == 19 && step.cache().starts);

  test::begin_section("a step on pages that fails");
  PageChanges failing = pages(2);
  SELFATTN_CHECK(fails([&] { append(held.source(failing), tokens, fail); }));
  SELFATTN_CHECK(lengths[0] == 7 && lengths[1] == 17 && held.untouched());

  test::begin_section("pages that are not read");
  lengths[0] = 9;
  PageChanges read = pages(0);
  CacheSource later = held.source(read);
  later.skipped = slots;
  CacheStep reading("attend", later, 0);
  const Pages::Table& table = reading.cache().pages.tables[0];
  SELFATTN_CHECK(table.numbers == first + 1 && table.first == 1 &&
                 integer_at(static_cast<const char*>(reading.cache().starts.data)) == slots);

  test::begin_section("pages that are refused");
  const auto paged = [&](const std::int32_t* numbers, std::int64_t count, std::int64_t start, std::int64_t length) {
    return [=, &held]() mutable {
      PageChanges changes({{numbers, count, start, &length}}, 2);
      append(held.source(changes), NewTokens(2, 1));
    };
  };
  const std::int32_t outside[] = {1, 4}, negative[] = {-1};
  SELFATTN_CHECK(refuses(paged(outside, 1, 0, 7), "the pages of sequence 0 do not fit its length"));
  SELFATTN_CHECK(refuses(paged(outside, 2, 0, 7), "gives sequence 0 a page outside 0..3"));
  SELFATTN_CHECK(refuses(paged(negative, 1, 0, 0), "gives sequence 0 a page outside 0..3"));
  SELFATTN_CHECK(refuses(paged(outside, 2, 3, 2), "has the tokens 3 to 2, which is impossible"));
  SELFATTN_CHECK(held.untouched());
}

void check_pool() {
  check_shared_pages();
  check_reused_pages();
  check_refused_growth();
  check_memory_of_rows();
  check_any_order();
}

}  // namespace selfattn::native
