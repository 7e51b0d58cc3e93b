// Constants and rounding helpers shared by drivers and kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace selfattn {

constexpr double log2_e = 1.4426950408889634074;
constexpr double ln_2 = 0.69314718055994530942;

// a / b rounded up, for non-negative a and positive b. Cannot overflow.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// Rounds a number of bytes up to whole cache lines.
constexpr std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace selfattn
