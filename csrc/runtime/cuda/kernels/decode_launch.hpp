// Decode of the cuda world as the host sees it.
#pragma once
#include "runtime/cuda/kernels/launch.hpp"
#include "schedule/decode_slices.hpp"

namespace moecomm::cuda {

// `call.gates` is the count of the rank's meetings, which only grows.
struct DecodeDispatchLaunch {
  Call call;
  int32_t squad = 1;  // warps of a group; divides spread.warps
  DecodeDispatchWork work;
};

struct DecodeCombineLaunch {
  Call call;
  int32_t squad = 1;
  DecodeCombineWork work;
};

// Warps of a group: as many as leave a group for each of `wanted` things to do at once.
constexpr int squad_of(const Spread& spread, int wanted) {
  for (int warps = spread.warps; warps > 1; --warps)
    if (spread.warps % warps == 0 && spread.sms * (spread.warps / warps) >= wanted) return warps;
  return 1;
}

// As Kernels. A launch runs the first half of its verb, the second, or both.
struct DecodeKernels {
  int (*prepare)();
  int (*dispatch)(const DecodeDispatchLaunch& launch, void* stream);
  int (*combine)(const DecodeCombineLaunch& launch, void* stream);
};
const DecodeKernels& loopback_decode_kernels();
const DecodeKernels& gin_decode_kernels();  // only where this build has NCCL's headers

}  // namespace moecomm::cuda
