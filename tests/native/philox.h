// The random numbers of dropout, computed without vectors.
#pragma once
#include <cstdint>

namespace selfattn {

// One word of Philox4x32-10 (Salmon et al., 2011) as the paper defines it. Static, because code for different
// instruction sets must not share inline functions.
static inline std::uint32_t philox_word(const std::uint32_t (&counter)[4], std::uint64_t seed, int index) {
  std::uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c[0], b = std::uint64_t{0xCD9E8D57} * c[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c[index];
}

}  // namespace selfattn
