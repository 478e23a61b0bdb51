// Row checksum of MOECOMM_CHECK=1: order-sensitive, 8 bytes at a time; for finding errors, not forgers.
#pragma once
#include <cstring>

#include "base/types.hpp"

namespace moecomm {

MOE_HD inline uint64_t row_checksum(const void* row, uint64_t bytes, uint64_t seed) {
  const unsigned char* p = static_cast<const unsigned char*>(row);
  uint64_t h = seed * 0x9E3779B97F4A7C15ull + bytes;
  for (uint64_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t w;
    memcpy(&w, p + i, 8);
    h = (h ^ w) * 0xFF51AFD7ED558CCDull;
    h ^= h >> 32;
  }
  return h;
}

}  // namespace moecomm
