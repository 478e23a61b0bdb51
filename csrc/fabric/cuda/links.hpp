// What a rank of the cuda world reaches, as its kernels are told. No CUDA type: the host side reads it too.
#pragma once
#include "base/counters.hpp"
#include "base/wire.hpp"

namespace moecomm {

// What a failing rank leaves for its host, in pinned memory; `code` is written last. A kernel writes where it
// is 0, and the host sets it back when it has read the status: neither sees a record that the other one is
// at.
struct FaultRecord {
  Status status;
  uint64_t code = 0;
};

// A rank's two records: of what a call was refused for, which is forgotten once told; and of what is final,
// which stays, and which no refusal hides.
constexpr int kFaultRecords = 2;

// What a rank has mapped. Device memory is named by plain pointers; the host's Buffer owns all of it.
struct DeviceLinks {
  Geometry geometry;
  char** windows = nullptr;  // [P] by local rank
  char* rail_region = nullptr;
  char** regions = nullptr;              // [peers] for the loopback rail; null where stores do not reach
  const void* network = nullptr;         // for other rails: what fabric/cuda/gin.cuh finds its peers by
  uint64_t region_offset = 0;            // of the rail region in a rank's window
  uint64_t* same_device = nullptr;       // bit i of word i / 64: local rank i is on this rank's GPU
  Offset<FaultWord> window_faults = {};  // per local rank
  Offset<FaultWord> region_faults = {};  // per peer
  int32_t region_peers = 0;
  int32_t own_peer = 0;           // this rank's index among them
  uint64_t* failed = nullptr;     // not 0: this rank's warps end; [1], [2]: not 0: the record is taken, of a
                                  // refusal, of what is final
  FaultRecord* faults = nullptr;  // [kFaultRecords], pinned
  Counters* counters = nullptr;   // totals of all warps
};

}  // namespace moecomm
