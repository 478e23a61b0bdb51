#include "runtime/cuda/memory.hpp"

#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>

namespace moecomm::cuda {

void require(int error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

OnDevice::OnDevice(int device) {
  require(cudaGetDevice(&before_), "asking for the current device");
  require(cudaSetDevice(device), "choosing a device");
}
OnDevice::~OnDevice() { cudaSetDevice(before_); }

std::shared_ptr<DeviceMemory> DeviceMemory::create(int device, uint64_t bytes) {
  const OnDevice on(device);
  void* p = nullptr;
  require(cudaMalloc(&p, bytes), ("allocating " + std::to_string(bytes) + " bytes").c_str());
  std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device, static_cast<char*>(p), bytes, false));
  require(cudaMemset(p, 0, bytes), "clearing memory");
  require(cudaDeviceSynchronize(), "clearing memory");
  return memory;
}

std::shared_ptr<DeviceMemory> DeviceMemory::open(int device, const std::string& handle) {
  const OnDevice on(device);
  cudaIpcMemHandle_t h;
  if (handle.size() != sizeof(h)) throw std::invalid_argument("a CUDA IPC handle has another size");
  std::memcpy(&h, handle.data(), sizeof(h));
  void* p = nullptr;
  require(cudaIpcOpenMemHandle(&p, h, cudaIpcMemLazyEnablePeerAccess), "mapping a peer's window");
  return std::shared_ptr<DeviceMemory>(new DeviceMemory(device, static_cast<char*>(p), 0, true));
}

DeviceMemory::~DeviceMemory() {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device_) != cudaSuccess) return;   // the driver is gone already
  if (opened_) cudaIpcCloseMemHandle(data_);
  else cudaFree(data_);
  cudaSetDevice(before);
}

std::string DeviceMemory::export_handle() const {
  const OnDevice on(device_);
  cudaIpcMemHandle_t h;
  require(cudaIpcGetMemHandle(&h, data_), "exporting a window");
  return std::string(reinterpret_cast<const char*>(&h), sizeof(h));
}

Pinned::Pinned(uint64_t bytes) {
  void* p = nullptr;
  require(cudaHostAlloc(&p, bytes, cudaHostAllocPortable | cudaHostAllocMapped), "allocating pinned memory");
  data_ = static_cast<char*>(p);
  std::memset(data_, 0, bytes);
}
Pinned::~Pinned() { cudaFreeHost(data_); }

}  // namespace moecomm::cuda
