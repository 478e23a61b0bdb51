// Starting a kernel on a call's multiprocessors.
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

// All shared memory that the device has, for kernels that use it.
inline int allow_shared_memory(std::initializer_list<const void*> kernels) {
  int bytes = 0, sms = 0;
  if (const int e = shared_bytes_limit(&bytes, &sms)) return e;
  for (const void* kernel : kernels)
    if (const int e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
      return e;
  return cudaSuccess;
}

}  // namespace moecomm::cuda
