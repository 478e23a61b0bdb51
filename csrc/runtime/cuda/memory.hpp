// Owners of the cuda world's memory: DeviceMemory (allocated here, or a peer's), Pinned (host memory that
// kernels write).
#pragma once
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "fabric/cuda/links.hpp"

namespace moecomm::cuda {

// Throws std::runtime_error with CUDA's error text, if there is an error.
void require(int error, const char* what);

// The capture that a stream is part of; 0: none.
uint64_t capture_of(void* stream);

// Keeps this thread's CUDA calls out of graph captures of other threads. Without it, calls that are not
// allowed during a capture (an allocation, a stream query) fail here and invalidate the capture of the other
// thread.
class BesideCaptures {
 public:
  BesideCaptures();
  ~BesideCaptures();
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  int mode_;
};

// Makes a device current for a scope, outside of captures.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();

 private:
  BesideCaptures beside_;
  int before_;  // the previous device; -1: it was current already
};

// Allocation never waits for other work on the device: kernels of other ranks may run on it and wait for this
// rank.
class DeviceMemory {
 public:
  static std::shared_ptr<DeviceMemory> create(int device, uint64_t bytes);  // zero-filled
  // The memory of another process; handle: from its export_handle().
  static std::shared_ptr<DeviceMemory> open(int device, const std::string& handle);
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

// The failure that kernels have reported in the records of DeviceLinks. A final failure comes first and is
// returned by every call; another failure is returned once.
Status take_fault(std::initializer_list<FaultRecord*> records, Status& broken);
Code reported(FaultRecord* record);

// Zero-filled host memory that every device can access at the same address.
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
