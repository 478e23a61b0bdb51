// Row checksum of MOECOMM_CHECK=1. It depends on the order of the bytes and reads 8 at a time (rows are
// 8-byte aligned). It finds errors; it does not protect against forgery.
#pragma once
#include <cstring>

#include "base/types.hpp"

namespace moecomm {

MOE_OUTLINE uint64_t row_checksum(const void* row, uint64_t bytes, uint64_t seed) {
  const unsigned char* p = static_cast<const unsigned char*>(row);
  uint64_t h = seed * 0x9E3779B97F4A7C15ull + bytes;
  const auto mix = [&](uint64_t w) {
    h = (h ^ w) * 0xFF51AFD7ED558CCDull;
    h ^= h >> 32;
  };
  uint64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t w;
    memcpy(&w, __builtin_assume_aligned(p + i, 8), 8);
    mix(w);
  }
  if (i == bytes) return h;
  uint64_t rest = 0;  // assembled in a register: on a GPU, memcpy of a variable size would need local memory
  for (int shift = 0; i < bytes; ++i, shift += 8) rest |= static_cast<uint64_t>(p[i]) << shift;
  mix(rest);
  return h;
}

// Ties a checksum to one call, source and token, so that a row left over from an earlier call is detected
// too.
MOE_HD constexpr uint64_t checksum_seed(uint64_t epoch, int rank, int64_t token) {
  return epoch << 40 ^ static_cast<uint64_t>(rank) << 24 ^ static_cast<uint64_t>(token);
}

}  // namespace moecomm
