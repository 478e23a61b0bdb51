// A GPU warp as a group: 32 lanes, broadcasts by shuffles, no barrier wider than the warp.
#pragma once
#include "exec/group.hpp"

namespace moecomm {

struct Warp {
  static __device__ int lane() { return threadIdx.x & 31; }
  static constexpr MOE_HD int size() { return 32; }
  static __device__ void sync() { __syncwarp(); }
  // A vote does not order memory, but callers then read what other lanes have stored. The __syncwarp() orders
  // these accesses.
  static __device__ bool any(bool v) {
    __syncwarp();
    return __any_sync(~0u, v);
  }
  // Copies a trivially copyable value word by word. Shuffles do not order memory; the __syncwarp() does.
  template <class T>
  static __device__ T broadcast(T v, int from) {
    constexpr int kWords = (sizeof(T) + 3) / 4;
    uint32_t words[kWords] = {};
    memcpy(words, &v, sizeof(T));
    __syncwarp();
    MOE_UNROLL(16)
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(~0u, words[i], from);
    T out;
    memcpy(&out, words, sizeof(T));
    return out;
  }
};
static_assert(Group<Warp>);

}  // namespace moecomm
