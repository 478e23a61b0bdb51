// The kernels of a Domain for ranks that map each other's memory.
#include "runtime/cuda/kernels/domain_kernels.cuh"

namespace moecomm::cuda {

const DomainKernels& loopback_domain_kernels() { return domain_kernels_over<LoopbackDeviceRail>; }

}  // namespace moecomm::cuda
