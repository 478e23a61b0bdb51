// Squad: several warps of a block as one group, for short calls (decode), which divide a row among more lanes
// than a warp has.
#pragma once
#include "exec/warp.cuh"
#include "fabric/cuda/ptx.cuh"

namespace moecomm {

struct Squad {
  int first;  // first warp in the block; only this squad uses barrier first + 1 of the block
  int warps;
  uint32_t* words;  // shared memory of the squad, 64 bytes

  __device__ int lane() const { return static_cast<int>(threadIdx.x) - 32 * first; }
  __device__ int size() const { return 32 * warps; }
  __device__ void sync() const {
    if (warps == 1)
      Warp::sync();
    else
      ptx::block_barrier(first + 1, size());
  }
  __device__ bool any(bool v) const {
    const bool here = Warp::any(v);
    if (warps == 1) return here;
    if (lane() % 32 == 0) words[lane() / 32] = here;
    sync();
    uint32_t found = 0;
    for (int i = 0; i < warps; ++i) found |= words[i];
    sync();
    return found != 0;
  }
  template <class T>
  __device__ T broadcast(T v, int from) const {
    if (warps == 1) return Warp::broadcast(v, from);
    constexpr int kWords = (sizeof(T) + 3) / 4;
    static_assert(kWords <= 16);
    uint32_t copy[kWords] = {};
    if (lane() == from) {
      memcpy(copy, &v, sizeof(T));
      MOE_UNROLL(16)
      for (int i = 0; i < kWords; ++i) words[i] = copy[i];
    }
    sync();
    MOE_UNROLL(16)
    for (int i = 0; i < kWords; ++i) copy[i] = words[i];
    sync();  // no lane overwrites the words while another lane still reads them
    T out;
    memcpy(&out, copy, sizeof(T));
    return out;
  }
};
static_assert(Group<Squad>);

}  // namespace moecomm
