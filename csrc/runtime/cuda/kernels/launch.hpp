// The kernels of the cuda world, for the host: their arguments, and the functions that launch them.
#pragma once
#include <cstdint>

#include "fabric/cuda/links.hpp"
#include "schedule/concurrent.hpp"

namespace moecomm::cuda {

// The words of a rank's latches: the latches, and the number of groups that have left the call. All are 0
// when a call begins: the last group that leaves clears them, and the words of DeviceLinks::failed. So no
// memory operation precedes a call.
constexpr int kLatchWords = static_cast<int>(Latch::count) + 1;
constexpr int kLeft = static_cast<int>(Latch::count);

constexpr int kMaxWarps = 12;  // per block, with one block per multiprocessor: 168 registers per thread

// The launch plan: how a call is spread over the GPU. moecomm.tuning chooses it.
struct Spread {
  int32_t sms = 20;
  int32_t warps = kMaxWarps;    // per block
  int32_t senders = 0;          // warps that send before they forward; 0: all
  uint32_t stage_bytes = 3584;  // of a stage of a warp; a multiple of 128
  int32_t stages = 3;           // per warp: 2..4
};

// What the coordinator reports to the host during the call, in pinned memory. `ticket` is written last.
struct Placed {
  int64_t rows;     // of this rank
  uint64_t needed;  // bytes of its block and output
  uint64_t offset;  // of its block in the window
  Code verdict;
  uint64_t ticket;
};

struct Call {
  DeviceLinks links;
  Spread spread;
  uint64_t timeout_ns = 0;
  uint64_t* latches = nullptr;  // [kLatchWords]; of decode: the count of its barrier
  Verb verb = Verb::unknown;
  uint64_t memory = 0;   // number of the memory that the call uses: equal on all ranks
  bool begins = false;   // the launch begins a call; else it is the second phase of one
  bool awaited = false;  // the host waits for the result
};

struct DispatchLaunch {
  Call call;
  DispatchWork work;
  Placed* placed;  // null: the host does not wait (capacity mode)
  uint64_t ticket;
};

struct CombineLaunch {
  Call call;
  CombineArgs args;
};

// The kernels over one kind of rail. All return a cudaError_t; `stream` is a cudaStream_t.
struct Kernels {
  int (*prepare)();  // loads every kernel in advance: a lazy load would wait for peers' kernels
  int (*dispatch)(const DispatchLaunch& launch, void* stream);
  int (*combine)(const CombineLaunch& launch, void* stream);
};
const Kernels& loopback_kernels();
const Kernels& gin_kernels();  // only in builds with NCCL's headers

int shared_bytes_limit(int* bytes, int* sms);  // of the current device; a cudaError_t
uint32_t shared_bytes(const Spread& spread);   // of a block
const char* error_text(int error);

}  // namespace moecomm::cuda
