// The kernels of ranks whose rail is NCCL's network.
#include "fabric/cuda/gin.cuh"
#include "world/cuda/kernels.cuh"

namespace moecomm::cuda {

const Kernels& gin_kernels() { return kernels_over<GinRail>; }

}  // namespace moecomm::cuda
