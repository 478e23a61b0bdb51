// The kernels for ranks whose rail is NCCL's network.
#include "fabric/cuda/gin.cuh"
#include "runtime/cuda/kernels/decode_kernels.cuh"
#include "runtime/cuda/kernels/domain_kernels.cuh"
#include "runtime/cuda/kernels/kernels.cuh"

namespace moecomm::cuda {

const Kernels& gin_kernels() { return kernels_over<GinRail>; }
const DecodeKernels& gin_decode_kernels() { return decode_kernels_over<GinRail>; }
const DomainKernels& gin_domain_kernels() { return domain_kernels_over<GinRail>; }

}  // namespace moecomm::cuda
