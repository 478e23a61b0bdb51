// A __global__ function per verb of the decode path, and the functions that launch them, for any rail.
#pragma once
#include <cuda_runtime.h>

#include "runtime/cuda/kernels/decode_launch.hpp"
#include "runtime/cuda/kernels/run_group.cuh"
#include "runtime/cuda/kernels/start.cuh"

namespace moecomm::cuda {
namespace {

// Squads with adjacent indices are on different multiprocessors. All share one stream of the rail, because
// one of them signals for others.
template <DeviceRail Rail, class Role>
__device__ void run_squad(const Call& call, int warps, Role&& role) {
  extern __shared__ __align__(128) char shared[];
  const int squads = blockDim.x / 32 / warps, squad = threadIdx.x / 32 / warps;
  char* own =
      shared + squad * warps *
                   warp_shared_bytes(call.spread.stage_bytes, call.spread.stages);  // that of its first warp
  const Squad g{squad * warps, warps, Offset<WarpScratch>{}.in(own)->words};
  run_as_squad(call, Rail::of(call.links, 0), g, squad * gridDim.x + blockIdx.x, squads * gridDim.x, own,
               role);
}

template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    decode_dispatch_kernel(const __grid_constant__ DecodeDispatchLaunch launch) {
  run_squad<Rail>(launch.call, launch.squad, [&](Squad g, auto fabric, auto barrier, int index) {
    return decode_dispatch_group(g, fabric, barrier, launch.work, index, barrier.all / g.warps);
  });
}

template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    decode_combine_kernel(const __grid_constant__ DecodeCombineLaunch launch) {
  run_squad<Rail>(launch.call, launch.squad, [&](Squad g, auto fabric, auto barrier, int index) {
    return decode_combine_group(g, fabric, barrier, launch.work, index, barrier.all / g.warps);
  });
}

template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    decode_release_kernel(const __grid_constant__ DecodeCombineLaunch launch) {
  run_squad<Rail>(launch.call, launch.squad, [&](Squad g, auto fabric, auto barrier, int index) {
    return decode_release_group(g, fabric, barrier, launch.work, index, barrier.all / g.warps);
  });
}

template <DeviceRail Rail>
int prepare_decode() {
  return allow_shared_memory(decode_dispatch_kernel<Rail>, decode_combine_kernel<Rail>,
                             decode_release_kernel<Rail>);
}

template <DeviceRail Rail>
int launch_decode_dispatch(const DecodeDispatchLaunch& launch, void* stream) {
  return start(decode_dispatch_kernel<Rail>, launch, stream);
}
template <DeviceRail Rail>
int launch_decode_combine(const DecodeCombineLaunch& launch, void* stream) {
  return start(decode_combine_kernel<Rail>, launch, stream);
}
template <DeviceRail Rail>
int launch_decode_release(const DecodeCombineLaunch& launch, void* stream) {
  return start(decode_release_kernel<Rail>, launch, stream);
}

template <DeviceRail Rail>
constexpr DecodeKernels decode_kernels_over{prepare_decode<Rail>, launch_decode_dispatch<Rail>,
                                            launch_decode_combine<Rail>, launch_decode_release<Rail>};

}  // namespace
}  // namespace moecomm::cuda
