// The roles as kernels: a warp each for the ring, a warp per channel for the experts. Over ranks that map
// each other's memory; GinRail in the place of LoopbackDeviceRail makes kernels for NCCL's network.
#include "own_roles.hpp"

#include "fabric/cuda/domain.cuh"
#include "runtime/cuda/kernels/kernels.cuh"

namespace own_roles {

using namespace moecomm;

using Rail = LoopbackDeviceRail;

__global__ void __launch_bounds__(32 * cuda::kMaxWarps, 1)
    domain_ring_kernel(const __grid_constant__ cuda::Call call, const __grid_constant__ RingArgs args) {
  cuda::run_warp<Rail>(call, [&](Warp g, auto fabric, auto, GroupIndex self) {
    return self.index == 0 ? ring_gather(g, DomainFabric<Rail>{fabric}, args) : Status{};
  });
}

__global__ void __launch_bounds__(32 * cuda::kMaxWarps, 1)
    domain_hot_kernel(const __grid_constant__ cuda::Call call, const __grid_constant__ HotArgs args) {
  cuda::run_warp<Rail>(call, [&](Warp g, auto fabric, auto, GroupIndex self) {
    return spread_hot(g, DomainFabric<Rail>{fabric}, args, self.index);
  });
}

}  // namespace own_roles
