// The cuda world as the host sees it: what a kernel is given, and the functions that start one.
#pragma once
#include <cstdint>

#include "fabric/cuda/links.hpp"
#include "schedule/seats.hpp"

namespace moecomm::cuda {

constexpr int kMaxWarps = 12;  // per block, one block per multiprocessor: 168 registers a thread

// How a call is spread over the GPU. moecomm.tuning chooses it.
struct Spread {
  int32_t sms = 20;
  int32_t warps = kMaxWarps;    // per block
  int32_t senders = 0;          // warps that send before they forward; 0: all
  uint32_t stage_bytes = 3584;  // a warp's stage; a multiple of 128
  int32_t stages = 3;           // of a warp: 2..4
};

// What the coordinator tells the host while the call goes on, in pinned memory; `ticket` is written last.
struct Placed {
  int64_t rows;     // of this rank
  uint64_t needed;  // bytes of its block and output
  uint64_t offset;  // of its block in the window
  int64_t verdict;
  uint64_t ticket;
};

struct Call {
  DeviceLinks links;
  Spread spread;
  uint64_t timeout_ns = 0;
  uint64_t* gates = nullptr;  // [Gate::count], 0 before every call
};

struct DispatchLaunch {
  Call call;
  DispatchWork work;
  Placed* placed = nullptr;  // null: the host does not wait (capacity mode)
  uint64_t ticket = 0;
};

struct CombineLaunch {
  Call call;
  CombineArgs args;
};

// The kernels over one kind of rail. All return a cudaError_t; `stream` is a cudaStream_t.
struct Kernels {
  int (*prepare)();  // load every kernel ahead: a lazy load would wait for peers' kernels
  int (*dispatch)(const DispatchLaunch& launch, void* stream);
  int (*combine)(const CombineLaunch& launch, void* stream);
};
const Kernels& loopback_kernels();
const Kernels& gin_kernels();  // only where this build has NCCL's headers

int shared_bytes_limit(int* bytes, int* sms);  // of the current device; a cudaError_t
uint32_t shared_bytes(const Spread& spread);   // of a block
const char* error_text(int error);

}  // namespace moecomm::cuda
