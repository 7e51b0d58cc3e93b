// Makes calls from concurrent threads. Every result must be bit-identical to that of one thread. If built with
// ThreadSanitizer, it must report nothing. The argument is the number of rounds that concurrent callers share.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <string>
#include <thread>

#include "parallel.h"
#include "registry.h"
#include "stress_cases.h"

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

struct Entry : StressCase {
  Results expected{};  // on one thread
  GradientArrays gradients{};
};

std::vector<Entry> entries() {
  std::vector<Entry> all;
  for (StressCase& made : stress_cases()) all.push_back({std::move(made)});
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
      // Forced, so also with more threads than tasks.
      expect(compute(entry.input, active_kernels(), threads, Threads::forced) == entry.expected,
             entry.name + " forced");
      expect(differentiate(entry.input, active_kernels(), threads, Threads::forced) == entry.gradients,
             "gradients of " + entry.name);
    }
}

// Computes several problems of one type in one call. Each result must be bit-identical to that of the problem alone.
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

// What a round computes depends only on the round's number.
void run_round(const std::vector<Entry>& all, const Case& long_one, int round) {
  Random random(static_cast<std::uint64_t>(round));
  const Entry& entry = all[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(all.size())))];
  const int threads = random.below(2) ? default_threads().count : 1 + static_cast<int>(random.below(4));
  if (round % 16 == 5) {
    interrupt(long_one, entry, threads, random.below(2) ? at_once : at_the_second_question);
  } else if (round % 4 == 0) {
    compute_together(all, threads);
  } else if (round % 4 == 1) {
    expect(differentiate(entry.input, active_kernels(), threads, Threads::as_planned, never) == entry.gradients,
           "gradients of " + entry.name + " next to other callers");
  } else {
    expect(compute(entry.input, active_kernels(), threads, Threads::as_planned, never) == entry.expected,
           entry.name + " next to other callers");
  }
}

void call_from_many_threads(const std::vector<Entry>& all, const Case& long_one, int rounds) {
  std::atomic<int> next{0}, running{4};
  std::vector<std::thread> callers;
  for (int count = running; count > 0; --count)
    callers.emplace_back([&] {
      for (int round; (round = next++) < rounds;) run_round(all, long_one, round);
      --running;
    });
  for (int count = 1; running > 0; count = count % 5 + 1) {
    set_default_threads(count);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  for (std::thread& caller : callers) caller.join();
  set_default_threads(0);
  std::printf("%zu callers at once, %d rounds\n", callers.size(), rounds);
}

// The first call of a process chooses kernels, back end and number of threads. Here, several threads make a first call
// at once.
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

int run(int rounds) {
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
  call_from_many_threads(all, long_one, rounds);
  std::printf("%d failures\n", failures.load());
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace selfattn::native

int main(int argc, char** argv) { return selfattn::native::run(argc > 1 ? std::atoi(argv[1]) : 100); }
