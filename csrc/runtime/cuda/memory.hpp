// Owners of the cuda world's memory: DeviceMemory (allocated here, or a peer's), Pinned (host memory that
// kernels write).
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "fabric/cuda/links.hpp"

namespace moecomm::cuda {

// Throws std::runtime_error with CUDA's own words.
void require(int error, const char* what);

// The capture that a stream is part of, 0: none.
uint64_t capture_of(void* stream);

// Other threads may be capturing graphs; the calls of this thread have no part in them. Without this, calls
// that a capture must not see (an allocation, a question to a stream) are refused here and end the other
// thread's capture.
class BesideCaptures {
 public:
  BesideCaptures();
  ~BesideCaptures();
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  int mode_;
};

// Makes a device current for a scope, beside captures.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();

 private:
  BesideCaptures beside_;
  int before_;  // -1: it was current already
};

// Making memory waits for nothing but itself: kernels of other ranks may run on this device and wait for this
// rank.
class DeviceMemory {
 public:
  static std::shared_ptr<DeviceMemory> create(int device, uint64_t bytes);  // zero-filled
  static std::shared_ptr<DeviceMemory> open(
      int device, const std::string& handle);  // another process's, by export_handle()
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  std::string export_handle() const;  // CUDA IPC; valid while this object lives

 private:
  DeviceMemory(int device, char* data, uint64_t bytes, bool opened)
      : device_(device), data_(data), bytes_(bytes), opened_(opened) {}
  int device_;
  char* data_;
  uint64_t bytes_;
  bool opened_;
};

// What kernels have reported: what is final first, and for ever; a refusal once.
Status take_fault(FaultRecord* faults, Status& broken);

// Zero-filled; every device sees it at the same address.
class Pinned {
 public:
  explicit Pinned(uint64_t bytes);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
};

}  // namespace moecomm::cuda
