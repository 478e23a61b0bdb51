// The decode kernels of ranks that map each other's memory.
#include "world/cuda/decode_kernels.cuh"

namespace moecomm::cuda {

const DecodeKernels& loopback_decode_kernels() { return decode_kernels_over<LoopbackDeviceRail>; }

}  // namespace moecomm::cuda
