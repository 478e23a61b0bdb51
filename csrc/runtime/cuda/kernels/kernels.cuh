// A __global__ shim per call of the throughput path, and the functions that start them, for any rail.
#pragma once
#include <cuda_runtime.h>

#include "runtime/cuda/kernels/seat.cuh"
#include "runtime/cuda/kernels/start.cuh"

namespace moecomm::cuda {
namespace {

// Neighbouring seats are on different multiprocessors.
template <class Rail, class Role>
__device__ void run_warp(const Call& call, Role&& role) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, seat = warp * gridDim.x + blockIdx.x;
  take_seat(call, Rail::of(call.links, seat), seat, warps * gridDim.x,
            shared + warp * warp_shared_bytes(call.spread.stage_bytes, call.spread.stages), role);
}

template <class Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    dispatch_kernel(const __grid_constant__ DispatchLaunch launch) {
  run_warp<Rail>(launch.call, [&](Warp g, auto fabric, auto gates, Seat seat) {
    return dispatch_seat(g, fabric, gates, launch.work, seat, [&launch, g] {
      if (g.lane() == 0 && launch.placed) tell_placed(launch);
    });
  });
}

template <class Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    combine_kernel(const __grid_constant__ CombineLaunch launch) {
  run_warp<Rail>(launch.call, [&](Warp g, auto fabric, auto gates, Seat seat) {
    return combine_seat(g, fabric, gates, launch.args, seat);
  });
}

template <class Rail>
int prepare() {
  return allow_shared_memory({reinterpret_cast<const void*>(dispatch_kernel<Rail>),
                              reinterpret_cast<const void*>(combine_kernel<Rail>)});
}

template <class Rail>
int launch_dispatch(const DispatchLaunch& launch, void* stream) {
  return start(dispatch_kernel<Rail>, launch, stream);
}
template <class Rail>
int launch_combine(const CombineLaunch& launch, void* stream) {
  return start(combine_kernel<Rail>, launch, stream);
}

template <class Rail>
constexpr Kernels kernels_over{prepare<Rail>, launch_dispatch<Rail>, launch_combine<Rail>};

}  // namespace
}  // namespace moecomm::cuda
