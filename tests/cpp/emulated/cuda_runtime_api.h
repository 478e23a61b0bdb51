// Stands in for the part of the CUDA runtime that the cuda world uses, on a CPU: device memory is heap
// memory, and a stream runs its work at once, or keeps it while it is captured.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "extents.hpp"

enum cudaError_t {
  cudaSuccess,
  cudaErrorPeerAccessAlreadyEnabled,
  cudaErrorNotReady,
  cudaErrorNotSupported,
  cudaErrorStreamCaptureUnsafe,
  cudaErrorInvalidValue
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum {
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaHostAllocPortable,
  cudaHostAllocMapped,
  cudaIpcMemLazyEnablePeerAccess,
  cudaStreamNonBlocking
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
struct cudaIpcMemHandle_t {
  char reserved[64];
};
struct cudaDeviceProp {
  struct {
    char bytes[16];
  } uuid;
};

namespace emulated {

// Captures in the default mode, "global": during such a capture, calls that are not allowed in a capture fail
// on every thread that has not chosen another mode, and invalidate the capture. Failed calls are counted.
inline std::atomic<int> global_captures{0}, refused_calls{0};
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline bool is_unsafe() {
  const bool refused = global_captures > 0 && capture_mode == cudaStreamCaptureModeGlobal;
  refused_calls += refused;
  return refused;
}

inline std::atomic<int> launches{0};  // of kernels

struct Stream {
  unsigned long long capture = 0;  // not 0: the stream is captured, and its work is kept
  std::vector<std::function<void()>> captured;

  void enqueue(std::function<void()> work) {
    if (capture)
      captured.push_back(std::move(work));
    else
      work();
  }
  std::vector<std::function<void()>> end_capture() {
    capture = 0;
    return std::exchange(captured, {});
  }
};

}  // namespace emulated

using cudaStream_t = emulated::Stream*;

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() {
  return emulated::is_unsafe() ? cudaErrorStreamCaptureUnsafe : cudaSuccess;
}
inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (emulated::is_unsafe()) return cudaErrorStreamCaptureUnsafe;
  *p = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  emulated::extents().add(*p, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  if (emulated::is_unsafe()) return cudaErrorStreamCaptureUnsafe;
  emulated::extents().remove(p);
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  emulated::extents().write(p, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  stream->enqueue([=] {
    std::memset(p, value, bytes);
    emulated::extents().write(p, bytes, true);
  });
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new emulated::Stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return emulated::is_unsafe() ? cudaErrorStreamCaptureUnsafe : cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emulated::capture_mode);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  if (emulated::is_unsafe()) return cudaErrorStreamCaptureUnsafe;
  std::memcpy(to, from, bytes);
  emulated::extents().write(to, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t stream) {
  stream->enqueue([=] {
    std::memcpy(to, from, bytes);
    emulated::extents().write(to, bytes, true);
  });
  return cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t) {
  return emulated::is_unsafe() ? cudaErrorStreamCaptureUnsafe : cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  return cudaSuccess;
}
// A handle identifies memory and its GPU. A process that cannot see that GPU cannot open it.
namespace emulated {
inline int hidden_gpu = -1, own_gpu = 0;
}
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* h, void* p) {
  std::memcpy(h->reserved, &p, sizeof(p));
  std::memcpy(h->reserved + sizeof(p), &emulated::own_gpu, sizeof(int));
  return cudaSuccess;
}
inline cudaError_t cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t h, unsigned) {
  int gpu = 0;
  std::memcpy(p, h.reserved, sizeof(*p));
  std::memcpy(&gpu, h.reserved + sizeof(*p), sizeof(int));
  return gpu == emulated::hidden_gpu ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id) {
  *status = stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = stream->capture;
  return cudaSuccess;
}
