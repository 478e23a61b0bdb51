// A __global__ function per verb of the throughput path, and the functions that launch them, for any rail.
#pragma once
#include <cuda_runtime.h>

#include "runtime/cuda/kernels/run_group.cuh"
#include "runtime/cuda/kernels/start.cuh"

namespace moecomm::cuda {
namespace {

// Warps with adjacent indices are on different multiprocessors. one_stream: all warps share one stream of the
// rail, because one warp signals for the puts of all.
template <DeviceRail Rail, class Role>
__device__ void run_warp(const Call& call, Role&& role, bool one_stream = false) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, index = warp * gridDim.x + blockIdx.x;
  run_as_warp(call, Rail::of(call.links, one_stream ? 0 : index), index, warps * gridDim.x,
              shared + warp * warp_shared_bytes(call.spread.stage_bytes, call.spread.stages), role);
}

template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    dispatch_kernel(const __grid_constant__ DispatchLaunch launch) {
  run_warp<Rail>(launch.call, [&](Warp g, auto fabric, auto latches, GroupIndex self) {
    return dispatch_group(g, fabric, latches, launch.work, self, [&launch, g] {
      if (g.lane() == 0 && launch.placed) tell_placed(launch);
    });
  });
}

template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    combine_kernel(const __grid_constant__ CombineLaunch launch) {
  run_warp<Rail>(launch.call, [&](Warp g, auto fabric, auto latches, GroupIndex self) {
    return combine_group(g, fabric, latches, launch.args, self);
  });
}

template <DeviceRail Rail>
int prepare() {
  return allow_shared_memory(dispatch_kernel<Rail>, combine_kernel<Rail>);
}

template <DeviceRail Rail>
int launch_dispatch(const DispatchLaunch& launch, void* stream) {
  return start(dispatch_kernel<Rail>, launch, stream);
}
template <DeviceRail Rail>
int launch_combine(const CombineLaunch& launch, void* stream) {
  return start(combine_kernel<Rail>, launch, stream);
}

template <DeviceRail Rail>
constexpr Kernels kernels_over{prepare<Rail>, launch_dispatch<Rail>, launch_combine<Rail>};

}  // namespace
}  // namespace moecomm::cuda
