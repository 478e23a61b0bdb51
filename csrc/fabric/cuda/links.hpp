// DeviceLinks: the memory that a rank of the cuda world can access, for its kernels. It uses no CUDA types,
// because host code includes it too.
#pragma once
#include "base/counters.hpp"
#include "base/wire.hpp"

namespace moecomm {

// The report of a failure from a kernel to its host, in pinned memory. `code` is written last. A kernel
// writes the record only if `code` is 0, and the host sets it to 0 after it has read the status. So neither
// reads a record that the other is writing.
struct FaultRecord {
  Status status;
  uint64_t code = 0;
};

// A rank has two records: one for failures of a call, which is cleared when it is read, and one for final
// failures, which stays. So a failure of a call never hides a final one.
constexpr int kFaultRecords = 2;
constexpr int kFailedWords = 3;  // of DeviceLinks::failed

// The kernels' count of a rank's calls on its communicator, in its own memory. The host cannot count them: a
// captured graph may be replayed any number of times, and every replay is a call.
struct CallClock {
  uint64_t number;          // of the latest call that has ended here
  uint64_t word;            // its waiting_word
  unsigned long long told;  // the latest word that was announced to the other ranks
  unsigned long long left;  // groups that have left the running call
};

// The memory that a rank has mapped, as plain pointers to device memory. The host's Buffer owns all of it.
struct DeviceLinks {
  Geometry geometry;
  char** windows = nullptr;  // [P] by local rank
  char* rail_region = nullptr;
  char** regions = nullptr;              // [peers] for the loopback rail; null: stores do not reach the peer
  const void* network = nullptr;         // for other rails: the network of fabric/cuda/gin.cuh
  uint64_t region_offset = 0;            // of the rail region in a rank's window
  uint64_t* same_device = nullptr;       // bit i of word i / 64: local rank i is on this rank's GPU
  Offset<FaultWord> window_faults = {};  // per local rank
  Offset<FaultWord> region_faults = {};  // per peer
  int32_t region_peers = 0;
  int32_t own_peer = 0;        // this rank's index among them
  uint64_t* failed = nullptr;  // [kFailedWords]: not 0: this rank's warps end; a record of this call's
                               // failure was written; a record of a final failure was written
  FaultRecord* faults[kFaultRecords] = {};  // pinned
  // The record of this rank's own wrong argument, pinned: in a call that no host waits for. Null in others.
  FaultRecord* own = nullptr;
  Counters* counters = nullptr;  // totals of all warps
  // The communicator's board, which every rank can access; null: none. Its peers are all ranks. On the board,
  // window_faults has the final failure that each rank has reported, and call_words the call that each rank
  // waits in.
  const DeviceLinks* board = nullptr;
  Offset<FaultWord> call_words = {};
  CallClock* clock = nullptr;
};

}  // namespace moecomm
