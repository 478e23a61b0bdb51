#include "runtime/cuda/memory.hpp"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <stdexcept>

namespace moecomm::cuda {

void require(int error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " +
                           cudaGetErrorString(static_cast<cudaError_t>(error)));
}

uint64_t capture_of(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  require(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id),
          "querying the capture of a stream");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

BesideCaptures::BesideCaptures() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  mode_ = mode;
}
BesideCaptures::~BesideCaptures() {
  auto mode = static_cast<cudaStreamCaptureMode>(mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

OnDevice::OnDevice(int device) {
  require(cudaGetDevice(&before_), "querying the current device");
  if (before_ == device)
    before_ = -1;
  else
    require(cudaSetDevice(device), "choosing a device");
}
OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

namespace {

// Uses a new stream: the default stream, or the whole device, may be busy with kernels that wait for this
// rank.
void clear(void* p, uint64_t bytes) {
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  const cudaError_t set = cudaMemsetAsync(p, 0, bytes, stream), done = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  require(set != cudaSuccess ? set : done, "clearing memory");
}

}  // namespace

std::shared_ptr<DeviceMemory> DeviceMemory::create(int device, uint64_t bytes) {
  const OnDevice on(device);
  void* p = nullptr;
  require(cudaMalloc(&p, bytes), ("allocating " + std::to_string(bytes) + " bytes").c_str());
  std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device, static_cast<char*>(p), bytes, false));
  clear(p, bytes);
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
  const BesideCaptures beside;
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device_) != cudaSuccess)
    return;  // the driver has been shut down
  if (opened_)
    cudaIpcCloseMemHandle(data_);
  else
    cudaFree(data_);
  cudaSetDevice(before);
}

std::string DeviceMemory::export_handle() const {
  const OnDevice on(device_);
  cudaIpcMemHandle_t h;
  require(cudaIpcGetMemHandle(&h, data_), "exporting a window");
  return std::string(bytes_of(&h), sizeof(h));
}

Pinned::Pinned(uint64_t bytes) {
  const BesideCaptures beside;
  void* p = nullptr;
  require(cudaHostAlloc(&p, bytes, cudaHostAllocPortable | cudaHostAllocMapped), "allocating pinned memory");
  data_ = static_cast<char*>(p);
  std::memset(data_, 0, bytes);
}
Pinned::~Pinned() {
  const BesideCaptures beside;
  cudaFreeHost(data_);
}

Code reported(FaultRecord* record) {
  return static_cast<Code>(std::atomic_ref(record->code).load(std::memory_order_acquire));
}

Status take_fault(std::initializer_list<FaultRecord*> records, Status& broken) {
  if (!broken.ok()) return broken;
  for (FaultRecord* record : {records.begin()[1], records.begin()[0]}) {
    if (!record || reported(record) == Code::ok) continue;
    std::atomic_ref code(record->code);
    const Status s = record->status;
    if (is_final(s))
      broken = s;
    else
      code.store(0, std::memory_order_release);  // from here on a kernel may write the next record
    return s;
  }
  return {};
}

}  // namespace moecomm::cuda
