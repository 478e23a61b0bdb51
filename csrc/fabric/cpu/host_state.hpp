// The memory that a rank has mapped, and the state of the call in progress. Owned by the runtime's
// PeerMemory.
#pragma once
#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "base/counters.hpp"
#include "base/roles.hpp"
#include "fabric/cpu/fault.hpp"
#include "fabric/cpu/futex.hpp"
#include "fabric/cpu/rows.hpp"
#include "fabric/cpu/waits.hpp"
#include "fabric/cpu/watch.hpp"

namespace moecomm {

// The time span in which a role ran, in nanoseconds of the steady clock.
struct RoleSpan {
  RoleKind role;
  int64_t begin, end;
};

// A rank that did not check its peers for this long was absent: it was stopped (SIGSTOP, a debugger, a
// suspended machine), or busy with its own part. Its peers must not be blamed for that time.
constexpr std::chrono::seconds kAbsence{1};
constexpr int kForgiven = 4;  // absences per call that extend its deadline; a limit, so that every wait ends

// Whether the user has interrupted the call (Ctrl-C). It is called from time to time while a rank waits. The
// language binding sets it once.
inline bool (*interrupted)() = nullptr;

// The call that this rank is in, among all calls of its communicator. A rank that waits for long announces it
// to its peers, so that ranks that wait for each other in different calls detect it.
struct CallState {
  uint64_t word = 0;  // waiting_word(); 0: no call yet
  bool announced = false;
  std::function<void(uint64_t word)> announce;
  Waits* waits = nullptr;
};

struct HostState {
  Geometry geometry;
  Offset<FaultWord> window_faults;  // per local rank in every window
  Offset<FaultWord> region_faults;  // per peer in every rail region
  Offset<FaultWord> fault_out;      // source of outgoing puts
  std::vector<int> peer_ranks;      // the peers of put() by index, -1: none
  int own_peer = 0;                 // this rank's index among them
  std::vector<uint8_t> masked;      // by rank, not 0: masked, so its memory is not written; empty: none
  char* windows[1024] = {};         // by local rank
  char* rail_region = nullptr;
  const RowKernels* kernels = &row_kernels();
  const Watch* watch = nullptr;
  CallState* call = nullptr;
  // The heartbeat counter of every rank, if a wait continues as long as its peer is alive; null: deadlines
  // are final.
  const std::vector<const Counter*>* beats = nullptr;
  Counters counters;
  std::vector<RoleSpan>* timeline = nullptr;  // null: tracing is off
  TermStore terms[2];
  char* targets[kMaxTopK];
  Fault fault;          // tests only
  bool stream = false;  // this call moves more than the caches hold: use non-temporal stores
  std::chrono::steady_clock::time_point deadline;
  std::chrono::steady_clock::duration timeout{};  // from the beginning of a call to its first deadline
  std::chrono::steady_clock::time_point begun;    // when this call began
  // When this rank last checked its peers, in this call or the one before.
  std::chrono::steady_clock::time_point checked = std::chrono::steady_clock::now();
  std::chrono::steady_clock::duration absent{};  // total in this call
  // From the last check in the previous call to the beginning of this one; or that call's absence, if longer.
  std::chrono::steady_clock::duration between{};
  int absences = 0;
  int beat_peer = -1;      // the peer whose heartbeat was last read in this call
  uint64_t last_beat = 0;  // and its value

  bool is_masked(int rank) const { return !masked.empty() && masked[rank]; }
  void begin(std::chrono::steady_clock::duration within) {
    const auto now = std::chrono::steady_clock::now();
    // The maximum, because an absence may end in the last steps of a call for which peers had done their
    // part.
    between = std::max(now - checked, absent);
    begun = checked = now;
    absent = {};
    absences = 0;
    beat_peer = -1;
    timeout = within;
    deadline = now + within;
  }
  // Call at every check of a peer. An absence of this rank extends the deadline, so that peers get their full
  // time.
  void check_absence(std::chrono::steady_clock::time_point now) {
    const auto gap = now - checked;
    checked = now;
    if (gap < kAbsence) return;
    absent += gap;
    if (++absences <= kForgiven) deadline += gap;
  }
  // Call while this rank waits for a peer. A heartbeat of the peer extends the deadline.
  void check_beat(int peer, std::chrono::steady_clock::time_point now) {
    if (!beats || peer < 0 || peer >= static_cast<int>(beats->size()) || !(*beats)[peer]) return;
    const uint64_t seen = (*beats)[peer]->load(std::memory_order_relaxed);
    if (peer == beat_peer && seen == last_beat) return;
    beat_peer = peer;
    last_beat = seen;
    deadline = std::max(deadline, now + timeout);
  }
  // Whether this rank was absent for so long in this call that peers may have given up on it.
  bool was_away() const {
    return absent >= std::max<std::chrono::steady_clock::duration>(kAbsence, timeout / 2);
  }
  // Whether this rank has only just entered the call, in which peers may have waited longer.
  bool came_late() const { return checked - begun < timeout / 2; }
};

}  // namespace moecomm
