// The decode kernels of the cuda world, for the host.
#pragma once
#include "runtime/cuda/kernels/launch.hpp"
#include "schedule/decode_slices.hpp"

namespace moecomm::cuda {

// `call.latches` is the count of the rank's barrier, which only grows.
struct DecodeDispatchLaunch {
  Call call;
  int32_t squad = 1;  // warps of a group; must divide spread.warps
  DecodeDispatchWork work;
};

struct DecodeCombineLaunch {
  Call call;
  int32_t squad = 1;
  DecodeCombineWork work;
};

// Warps of a group: as many as still leave at least `wanted` groups.
constexpr int squad_of(const Spread& spread, int wanted) {
  for (int warps = spread.warps; warps > 1; --warps)
    if (spread.warps % warps == 0 && spread.sms * (spread.warps / warps) >= wanted) return warps;
  return 1;
}

// Like Kernels. A launch runs the first phase of its verb, the second, or both.
struct DecodeKernels {
  int (*prepare)();
  int (*dispatch)(const DecodeDispatchLaunch& launch, void* stream);
  int (*combine)(const DecodeCombineLaunch& launch, void* stream);
  int (*release)(const DecodeCombineLaunch& launch, void* stream);  // before a further combine of an epoch
};
const DecodeKernels& loopback_decode_kernels();
const DecodeKernels& gin_decode_kernels();  // only in builds with NCCL's headers

}  // namespace moecomm::cuda
