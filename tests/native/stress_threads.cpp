// Concurrent threads, to be built with ThreadSanitizer, which must report nothing. Every result must be bit-identical
// to that of one thread. The argument is the seconds to spend on concurrent callers.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <mutex>
#include <string>
#include <thread>

#include "attend_case.h"
#include "parallel.h"
#include "registry.h"

namespace selfattn::native {
namespace {

std::atomic<int> failures{0};

void expect(bool good, const std::string& what) {
  if (good) return;
  failures.fetch_add(1);
  static std::mutex lines;
  const std::lock_guard lock(lines);
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

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

enum class Keys { whole, split };  // whether one task sees all keys, or their results must be merged

struct Entry {
  std::string name;
  Keys keys;
  Case input;
  Results expected{};  // of one thread
  GradientArrays gradients{};
};

Case many_tasks() {
  Case c = make({2, 4, 4, 150, 150, 16});
  c.options.causal = true;
  c.lse = true;
  return c;
}

Case decode() { return make({1, 2, 2, 1, 20000, 16}); }

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

Case copied() {  // neither queries, keys, values nor out can be used in place
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

std::vector<Entry> entries() {
  std::vector<Entry> all;
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
  for (Entry& entry : all) {
    entry.expected = compute(entry.input, active_kernels(), 1);
    entry.gradients = differentiate(entry.input, active_kernels(), 1);
    expect(entry.expected.threads == 1, entry.name + " asks for one thread");
    expect((entry.expected.plan.ranges > 1) == (entry.keys == Keys::split), entry.name + " splits its keys");
    bool varied = false;
    const Array& out = entry.expected.out;
    for (std::int64_t i = 1; i < out.count(); ++i) varied = varied || out.number(i) != out.number(0);
    expect(varied, entry.name + " computes something");
  }
  return all;
}

void compare(const Entry& entry, int threads, const char* where) {
  const Results results = compute(entry.input, active_kernels(), threads);
  expect(results.finished, entry.name + " ends, " + where);
  expect(results == entry.expected, entry.name + " has different results, " + where);
}

void change_the_number_of_threads(const std::vector<Entry>& all) {
  for (const Entry& entry : all)
    for (const int threads : {2, 3, 8, 1, 5, 2}) {
      const Results results = compute(entry.input, active_kernels(), threads);
      expect(results.threads > 1 || threads == 1, entry.name + " is worth a second thread");
      expect(results.finished && results == entry.expected, entry.name + " on " + std::to_string(threads));
      // More threads than tasks as well.
      expect(compute(entry.input, active_kernels(), threads, Threads::forced) == entry.expected,
             entry.name + " forced");
      expect(differentiate(entry.input, active_kernels(), threads, Threads::forced) == entry.gradients,
             "gradients of " + entry.name);
    }
}

// Several problems of one type at once; each result is bit-identical to that of the problem alone.
void compute_together(const std::vector<Entry>& all, int threads) {
  std::vector<Problem> problems;
  std::vector<Plan> plans;
  std::vector<Results> results;
  std::vector<const Entry*> together;
  for (const Entry& entry : all)
    if (computed_in(entry.input.q.dtype()) == DType::f32) together.push_back(&entry);
  for (const Entry* entry : together) {
    problems.push_back(make_problem(entry->input.arguments()));
    results.push_back(attach_results(entry->input, problems.back()));
    plans.push_back(make_plan(problems.back(), active_kernels()));
  }
  std::vector<Job> jobs;
  for (std::size_t i = 0; i < problems.size(); ++i) jobs.push_back({&problems[i], &plans[i]});
  expect(attend(jobs.data(), static_cast<std::int64_t>(jobs.size()), threads, nullptr), "several problems end");
  for (std::size_t i = 0; i < results.size(); ++i)
    expect(results[i] == together[i]->expected, together[i]->name + " among others");
}

// Far too long to finish; every head is the same memory.
Case endless() {
  const Layout repeated{.repeated = {false, true}};
  Case c;
  c.q = normal(DType::f32, {1, 512, 4000, 64}, 8, repeated);
  c.k = normal(DType::f32, {1, 512, 4000, 64}, 9, repeated);
  c.v = normal(DType::f32, {1, 512, 4000, 1}, 10, repeated);
  return c;
}

thread_local int questions = 0;
bool at_once() { return true; }
bool at_the_second_question() { return ++questions % 2 == 0; }
bool never() { return false; }

void interrupt(const Case& long_one, const Entry& next, int threads, Interrupted interrupted) {
  expect(!compute(long_one, active_kernels(), threads, Threads::as_planned, interrupted).finished,
         "an interrupted call");
  compare(next, threads, "after an interrupted call");
}

void interrupt_together(const Case& long_one, int threads) {
  Problem problems[] = {make_problem(long_one.arguments()), make_problem(long_one.arguments())};
  const Results results[] = {attach_results(long_one, problems[0]), attach_results(long_one, problems[1])};
  const Plan plan = make_plan(problems[0], active_kernels());
  const Job jobs[] = {{&problems[0], &plan}, {&problems[1], &plan}};
  expect(!attend(jobs, std::size(results), threads, at_once), "several interrupted problems");
}

void call_from_many_threads(const std::vector<Entry>& all, const Case& long_one, double seconds) {
  constexpr int callers = 4;
  std::atomic<bool> stop{false};
  std::atomic<std::int64_t> calls{0}, interrupts{0};
  const auto call = [&](int caller) {
    Random random(static_cast<std::uint64_t>(caller));
    while (!stop.load(std::memory_order_relaxed)) {
      const Entry& entry = all[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(all.size())))];
      const int threads = random.below(2) ? default_threads().count : 1 + static_cast<int>(random.below(4));
      if (calls.fetch_add(1) % 16 == caller) {
        interrupt(long_one, entry, threads, random.below(2) ? at_once : at_the_second_question);
        ++interrupts;
      } else if (caller == 0) {
        compute_together(all, threads);
      } else if (caller == 1) {
        expect(differentiate(entry.input, active_kernels(), threads, Threads::as_planned, never) == entry.gradients,
               "gradients of " + entry.name + " next to other callers");
      } else {
        expect(compute(entry.input, active_kernels(), threads, Threads::as_planned, never) == entry.expected,
               entry.name + " next to other callers");
      }
    }
  };
  std::vector<std::thread> others;
  for (int caller = 0; caller < callers; ++caller) others.emplace_back(call, caller);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const auto enough = [&] { return std::chrono::steady_clock::now() >= end && calls >= 50 && interrupts >= 3; };
  for (int count = 1; !enough(); count = count % 5 + 1) {
    set_default_threads(count);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  stop = true;
  for (std::thread& other : others) other.join();
  set_default_threads(0);
  std::printf("%d callers at once: %lld calls, %lld interrupted\n", callers, static_cast<long long>(calls),
              static_cast<long long>(interrupts));
}

// The first call of a process chooses kernels, back end and number of threads; here several threads do so at once.
void start_together() {
  const Case c = decode();
  std::atomic<int> ready{0};
  std::vector<Results> results(4);
  std::vector<std::thread> starters;
  for (std::size_t i = 0; i < results.size(); ++i)
    starters.emplace_back([&, i] {
      ready.fetch_add(1);
      while (ready.load() < 4) std::this_thread::yield();
      results[i] = compute(c, active_kernels(), 1 + default_threads().count);
    });
  for (std::thread& starter : starters) starter.join();
  for (const Results& result : results) expect(result.finished && result == results[0], "first calls at once");
}

int run(double seconds) {
  start_together();
  const std::vector<Entry> all = entries();
  std::printf("%s, %s, %zu cases\n", active_kernels().name, parallel_backend(), all.size());
  change_the_number_of_threads(all);
  for (const int threads : {1, 2, 3, 8}) compute_together(all, threads);
  const Case long_one = endless();
  for (const int threads : {1, 2, 4}) {
    interrupt(long_one, all.front(), threads, at_once);
    interrupt_together(long_one, threads);
  }
  call_from_many_threads(all, long_one, seconds);
  std::printf("%d failures\n", failures.load());
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace selfattn::native

int main(int argc, char** argv) { return selfattn::native::run(argc > 1 ? std::atof(argv[1]) : 10); }
