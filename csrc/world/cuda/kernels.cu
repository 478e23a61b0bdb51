// A __global__ shim per call of the throughput path, and the functions that start them.
#include <cuda_runtime.h>

#include "world/cuda/seat.cuh"

namespace moecomm::cuda {
namespace {

// Neighbouring seats are on different multiprocessors.
template <class Role>
__device__ void run_warp(const Call& call, Role&& role) {
  extern __shared__ char shared[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  take_seat(call, LoopbackDeviceRail{call.links.regions}, warp * gridDim.x + blockIdx.x, warps * gridDim.x,
            shared + warp * warp_shared_bytes(call.spread.stage_bytes), role);
}

__global__ void __launch_bounds__(32 * kMaxWarps, 1) dispatch_kernel(const __grid_constant__ DispatchLaunch launch) {
  run_warp(launch.call, [&](Warp g, auto fabric, auto gates, Seat seat) {
    return dispatch_seat(g, fabric, gates, launch.work, seat, [&launch, g] {
      if (g.lane() != 0 || !launch.placed) return;
      const DispatchArgs& a = launch.work.args;
      const int me = a.b.geometry.local();
      launch.placed->rows = a.plan.call.capacity >= 0 ? a.plan.call.capacity : a.plan.rank_rows[me];
      launch.placed->needed = a.needed[me];
      launch.placed->offset = a.target[me].rows;
      launch.placed->verdict = a.verdict->code;
      ptx::store_release_sys(&launch.placed->ticket, launch.ticket);
    });
  });
}

__global__ void __launch_bounds__(32 * kMaxWarps, 1) combine_kernel(const __grid_constant__ CombineLaunch launch) {
  run_warp(launch.call, [&](Warp g, auto fabric, auto gates, Seat seat) {
    return combine_seat(g, fabric, gates, launch.args, seat);
  });
}

template <class Kernel, class Launch>
int start(Kernel kernel, const Launch& launch, void* stream) {
  const Spread& spread = launch.call.spread;
  kernel<<<spread.sms, 32 * spread.warps, shared_bytes(spread), static_cast<cudaStream_t>(stream)>>>(launch);
  return cudaGetLastError();
}

int raise_shared_limit(const void* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

uint32_t shared_bytes(const Spread& spread) { return spread.warps * warp_shared_bytes(spread.stage_bytes); }

int shared_bytes_limit(int* bytes, int* sms) {
  int device = 0;
  if (const int e = cudaGetDevice(&device)) return e;
  if (const int e = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
  return cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device);
}

int prepare() {
  int bytes = 0, sms = 0;
  if (const int e = shared_bytes_limit(&bytes, &sms)) return e;
  for (const void* kernel : {reinterpret_cast<const void*>(dispatch_kernel), reinterpret_cast<const void*>(combine_kernel)})
    if (const int e = raise_shared_limit(kernel, bytes)) return e;
  return cudaSuccess;
}

int launch_dispatch(const DispatchLaunch& launch, void* stream) { return start(dispatch_kernel, launch, stream); }
int launch_combine(const CombineLaunch& launch, void* stream) { return start(combine_kernel, launch, stream); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace moecomm::cuda
