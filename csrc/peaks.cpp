#include "peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace selfattn {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Stream {
  const std::vector<std::uint64_t>& words;
  std::size_t share;
  std::atomic<std::uint64_t> sum{0};
};

void read_share(void* context, int thread) noexcept {
  Stream& stream = *static_cast<Stream*>(context);
  const std::size_t begin = std::min(stream.share * static_cast<std::size_t>(thread), stream.words.size());
  const std::size_t end = std::min(begin + stream.share, stream.words.size());
  constexpr std::size_t lanes = 32;  // independent sums, so that loads are the bottleneck
  std::uint64_t sums[lanes] = {};
  std::size_t i = begin;
  for (; i + lanes <= end; i += lanes)
    for (std::size_t l = 0; l < lanes; ++l) sums[l] += stream.words[i + l];
  std::uint64_t sum = 0;
  for (const std::uint64_t s : sums) sum += s;
  stream.sum.fetch_add(sum, std::memory_order_relaxed);
}

}  // namespace

double measure_product_peak(PeakLoop loop, double seconds) {
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point begin = Clock::now();
    const double flops = loop(20000);
    best = std::max(best, flops / seconds_since(begin));
  } while (seconds_since(start) < seconds);
  return best;
}

double measure_read_bandwidth(std::size_t bytes, int num_threads, double seconds) {
  const std::vector<std::uint64_t> words(std::max<std::size_t>(bytes / sizeof(std::uint64_t), 1), 1);
  const auto threads = static_cast<std::size_t>(std::max(num_threads, 1));
  Stream stream{words, ceil_div(words.size(), threads)};
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point begin = Clock::now();
    run_region({read_share, [](void*) noexcept {}, &stream}, num_threads);
    best = std::max(best, static_cast<double>(bytes) / seconds_since(begin));
  } while (seconds_since(start) < seconds);
  return best;
}

}  // namespace selfattn
