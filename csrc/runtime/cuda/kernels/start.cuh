// Launches a kernel on the multiprocessors of a call.
#pragma once
#include <cuda_runtime.h>

#include <initializer_list>

#include "runtime/cuda/kernels/launch.hpp"

namespace moecomm::cuda {

template <class Kernel, class Launch>
int start(Kernel kernel, const Launch& launch, void* stream) {
  const Spread& spread = launch.call.spread;
  kernel<<<spread.sms, 32 * spread.warps, shared_bytes(spread), static_cast<cudaStream_t>(stream)>>>(launch);
  return cudaGetLastError();
}

// Allows kernels to use all shared memory of a multiprocessor.
template <class... Launches>
int allow_shared_memory(void (*... kernels)(Launches)) {
  int bytes = 0, sms = 0;
  if (const int e = shared_bytes_limit(&bytes, &sms)) return e;
  for (const void* kernel : {reinterpret_cast<const void*>(kernels)...})
    if (const int e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
      return e;
  return cudaSuccess;
}

}  // namespace moecomm::cuda
