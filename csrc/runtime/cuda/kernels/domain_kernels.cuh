// A __global__ function per verb of a Domain, and the functions that launch them, for any rail.
#pragma once
#include <cuda_runtime.h>

#include "fabric/cuda/domain.cuh"
#include "runtime/cuda/kernels/domain_launch.hpp"
#include "runtime/cuda/kernels/kernels.cuh"

namespace moecomm::cuda {
namespace {

// One-sided requests share one stream of the rail, so that a later signal is ordered after all of them.
template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    domain_one_sided_kernel(const __grid_constant__ OneSidedLaunch launch) {
  run_warp<Rail>(
      launch.call,
      [&](Warp g, auto fabric, auto latches, GroupIndex self) {
        return one_sided_group(g, DomainFabric<Rail>{fabric}, latches, launch.work, self.index,
                               self.workers + 1);
      },
      true);
}

template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    domain_multicast_kernel(const __grid_constant__ MulticastLaunch launch) {
  run_warp<Rail>(launch.call, [&](Warp g, auto fabric, auto latches, GroupIndex self) {
    return multicast_group(g, DomainFabric<Rail>{fabric}, latches, launch.work, self.index);
  });
}

template <DeviceRail Rail>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    domain_reduce_kernel(const __grid_constant__ ReduceLaunch launch) {
  run_warp<Rail>(launch.call, [&](Warp g, auto fabric, auto latches, GroupIndex self) {
    return reduce_group(g, DomainFabric<Rail>{fabric}, latches, launch.work, self.index);
  });
}

template <DeviceRail Rail>
int prepare_domain() {
  return allow_shared_memory(domain_one_sided_kernel<Rail>, domain_multicast_kernel<Rail>,
                             domain_reduce_kernel<Rail>);
}

template <DeviceRail Rail>
int launch_one_sided(const OneSidedLaunch& launch, void* stream) {
  return start(domain_one_sided_kernel<Rail>, launch, stream);
}
template <DeviceRail Rail>
int launch_multicast(const MulticastLaunch& launch, void* stream) {
  return start(domain_multicast_kernel<Rail>, launch, stream);
}
template <DeviceRail Rail>
int launch_reduce(const ReduceLaunch& launch, void* stream) {
  return start(domain_reduce_kernel<Rail>, launch, stream);
}

template <DeviceRail Rail>
constexpr DomainKernels domain_kernels_over{prepare_domain<Rail>, launch_one_sided<Rail>,
                                            launch_multicast<Rail>, launch_reduce<Rail>};

}  // namespace
}  // namespace moecomm::cuda
