// The kernels for ranks that map each other's memory.
#include "runtime/cuda/kernels/kernels.cuh"

namespace moecomm::cuda {

uint32_t shared_bytes(const Spread& spread) {
  return spread.warps * warp_shared_bytes(spread.stage_bytes, spread.stages);
}

int shared_bytes_limit(int* bytes, int* sms) {
  int device = 0;
  if (const int e = cudaGetDevice(&device)) return e;
  if (const int e = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
  return cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device);
}

const Kernels& loopback_kernels() { return kernels_over<LoopbackDeviceRail>; }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace moecomm::cuda
