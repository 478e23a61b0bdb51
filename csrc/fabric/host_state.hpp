// What a rank has mapped, and the state of the call in progress. Owned by the runtime's Reach.
#pragma once
#include <chrono>
#include <vector>

#include "base/counters.hpp"
#include "base/roles.hpp"
#include "fabric/fault.hpp"
#include "fabric/futex.hpp"
#include "fabric/rows.hpp"
#include "fabric/watch.hpp"

namespace moecomm {

// When a role ran: nanoseconds of the steady clock.
struct RoleSpan {
  RoleKind role;
  int64_t begin, end;
};

// Whether the user wants the call to end (Ctrl-C): asked now and then while a rank waits. Set once by the language binding.
inline bool (*interrupted)() = nullptr;

struct HostState {
  Geometry geometry;
  uint64_t window_faults = 0;     // FaultWord per local rank in every window
  uint64_t region_faults = 0;     // FaultWord per peer in every rail region
  uint64_t region_outbox = 0;     // FaultWord on its way out
  std::vector<int> peer_ranks;    // the peers of put() by index, -1: none
  int own_peer = 0;               // this rank's index among them
  char* windows[1024] = {};       // by local rank
  char* rail_region = nullptr;
  const RowKernels* kernels = &row_kernels();
  const Watch* watch = nullptr;
  Counters counters;
  std::vector<RoleSpan>* timeline = nullptr;   // where somebody traces
  TermStore terms[2];
  char* targets[kMaxTopK];
  Fault fault;                    // tests only
  bool stream = false;            // this call moves more than the caches hold: store past them
  std::chrono::steady_clock::time_point deadline;
};

}  // namespace moecomm
