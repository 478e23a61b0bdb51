// What a rank has mapped, and the state of the call in progress. Owned by the runtime's Reach.
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
#include "fabric/cpu/watch.hpp"

namespace moecomm {

// When a role ran: nanoseconds of the steady clock.
struct RoleSpan {
  RoleKind role;
  int64_t begin, end;
};

// How long this rank may not look at what it waits for before that counts as absence: it was stopped
// (SIGSTOP, a debugger, a suspended machine), or busy with its own part. What peers did meanwhile is not
// theirs to answer for.
constexpr std::chrono::seconds kAbsence{1};
constexpr int kForgiven = 4;  // absences of one call that move its deadline: every wait ends

// Whether the user wants the call to end (Ctrl-C): asked now and then while a rank waits. Set once by the
// language binding.
inline bool (*interrupted)() = nullptr;

// Which call this rank is in, of all those of its communicator: told to the others where it waits for long,
// so that ranks that wait for each other in different calls learn it.
struct CallState {
  uint64_t word = 0;  // waiting_word; 0: there was none yet
  bool told = false;
  std::function<void(uint64_t word)> tell;
};

struct HostState {
  Geometry geometry;
  Offset<FaultWord> window_faults;  // per local rank in every window
  Offset<FaultWord> region_faults;  // per peer in every rail region
  Offset<FaultWord> fault_out;      // on its way out
  std::vector<int> peer_ranks;      // the peers of put() by index, -1: none
  int own_peer = 0;                 // this rank's index among them
  char* windows[1024] = {};         // by local rank
  char* rail_region = nullptr;
  const RowKernels* kernels = &row_kernels();
  const Watch* watch = nullptr;
  CallState* call = nullptr;
  Counters counters;
  std::vector<RoleSpan>* timeline = nullptr;  // where somebody traces
  TermStore terms[2];
  char* targets[kMaxTopK];
  Fault fault;          // tests only
  bool stream = false;  // this call moves more than the caches hold: store past them
  std::chrono::steady_clock::time_point deadline;
  std::chrono::steady_clock::duration timeout{};  // from the beginning of a call to its first deadline
  std::chrono::steady_clock::time_point begun;    // this call
  std::chrono::steady_clock::time_point looked =
      std::chrono::steady_clock::now();          // when this rank last looked, in this call or the one before
  std::chrono::steady_clock::duration absent{};  // in this call
  std::chrono::steady_clock::duration between{};  // from the last look in the call before to the beginning of
                                                  // this one, or that call's absence
  int absences = 0;

  void begin(std::chrono::steady_clock::duration within) {
    const auto now = std::chrono::steady_clock::now();
    between = std::max(
        now - looked,
        absent);  // an absence may end in the last steps of a call that peers had done their part for
    begun = looked = now;
    absent = {};
    absences = 0;
    timeout = within;
    deadline = now + within;
  }
  // Between two looks at a peer. An absence moves the deadline: peers get the time that they were promised.
  void look(std::chrono::steady_clock::time_point now) {
    const auto gap = now - looked;
    looked = now;
    if (gap < kAbsence) return;
    absent += gap;
    if (++absences <= kForgiven) deadline += gap;
  }
  // Whether it was away for so long in this call that peers may have ended without it; whether it has only
  // just come to a call in which they wait.
  bool was_away() const {
    return absent >= std::max<std::chrono::steady_clock::duration>(kAbsence, timeout / 2);
  }
  bool came_late() const { return looked - begun < timeout / 2; }
};

}  // namespace moecomm
