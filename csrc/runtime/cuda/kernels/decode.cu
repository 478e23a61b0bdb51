// The decode kernels for ranks that map each other's memory.
#include "runtime/cuda/kernels/decode_kernels.cuh"

namespace moecomm::cuda {

const DecodeKernels& loopback_decode_kernels() { return decode_kernels_over<LoopbackDeviceRail>; }

}  // namespace moecomm::cuda
