// PeerMemory: the memory of a rank that peers access (node window and rail region), the memory of peers that
// this rank can access, and the execution of calls over both. A Buffer has one PeerMemory for dispatch and
// combine, and decode has another one.
#pragma once
#include <array>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fabric/cpu/host.hpp"
#include "fabric/cpu/loopback.hpp"
#include "fabric/cpu/ucx_rail.hpp"
#include "runtime/cpu/communicator.hpp"
#include "runtime/memory.hpp"

namespace moecomm {

// The sizes of both memories, and the offsets of the parts that the runtime itself uses.
struct PeerMemoryLayout {
  uint64_t window_bytes = 0;
  Offset<FaultWord> window_faults;  // per local rank
  uint64_t warm_bytes = 0;          // of every window mapping: populated at start
  uint64_t region_bytes = 0;
  uint64_t region_counters = 0;     // counters are in the first region_counters bytes
  Offset<FaultWord> region_faults;  // per region peer
  Offset<FaultWord> fault_out;      // source of outgoing puts
  std::vector<int> peers;           // ranks of the fabric's peers by index; -1: not reached over the region
  int own = 0;                      // this rank's index among the peers
  bool one_memory = false;          // the window is also the rail region, with the same offsets and size
};

// A random number at the end of every window and in its contact. A rank that maps a window compares the two,
// to detect that it has mapped the wrong memory.
using Nonce = std::array<uint64_t, 2>;

class PeerMemory {
 public:
  PeerMemory(std::shared_ptr<Communicator> comm, PeerMemoryLayout plan);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Constructed collectively in three steps: construct, connect() with the contacts of all ranks, and after a
  // barrier finish_connect(). A contact is what peers need to access this rank's memory.
  std::string contact() const;
  void connect(const std::vector<std::string>& contacts);
  void finish_connect();

  const std::shared_ptr<Memory>& window() const { return window_; }
  bool rail_is_mapped() const;  // whether stores reach the rail peers' regions without the network
  Communicator& comm() const { return *comm_; }
  HostState& host() { return host_; }

  uint64_t number() const { return number_; }  // of this PeerMemory in its communicator; equal on all ranks
  void publish(FaultWord word);                // to all peers that it reaches
  void report(const Status& s);                // publishes a failure, and waits a moment until it is sent

  void trace(bool on);  // starts a timeline of roles, or drops it
  std::vector<RoleSpan> take_timeline() { return std::exchange(timeline_, {}); }

  // Waits until all puts and signals so far are complete at the peers. Only after begin().
  Status flush();

  // The final failure of its calls. After continue_without() it is independent of the communicator's.
  Status broken() const { return continues_ ? broken_ : comm_->broken(); }
  // Continues without masked ranks, while no rank is in a call. masked: by rank, not 0: masked. peer: one of
  // them. calls: the number of the latest call, equal on all remaining ranks.
  void continue_without(const std::vector<uint8_t>& masked, int peer, uint64_t calls);

  // Begins a call. stream: it moves more than the caches hold.
  void begin(bool stream);
  // Runs call(fabric). drain: also waits until the sources of its puts may be overwritten. A final failure is
  // reported to all peers within reach and to the communicator.
  template <class Call>
  Status run(bool drain, Call&& call) {
    if (const Status broken = this->broken(); !broken.ok()) return broken;
    Status s = region_ ? call(HostFabric<UcxRail>{&host_, &ucx_rail_})
                       : call(HostFabric<LoopbackRail>{&host_, &loopback_});
    // A signal handler forked, and its child returned into the call. The child is not a rank.
    if (!comm_->calls().is_here()) return s;
    // Also after a refused call, whose puts may not have been read yet.
    if (region_ && drain && !is_final(s) && s.code != Code::interrupted)
      if (const Status unread = flush(); !unread.ok()) s = unread;
    Status reported = s;
    if (s.code == Code::interrupted) reported.code = Code::lost;  // for the other ranks, this rank is lost
    if (is_final(reported)) {
      report_fault(reported);
      comm_->mark_broken(reported);
      broken_ = reported;
    }
    return s;
  }

 private:
  std::vector<char*> map_peers_on_host(const std::vector<std::string>& contacts);
  void report_fault(const Status& s);

  std::shared_ptr<Communicator> comm_;
  PeerMemoryLayout plan_;
  std::shared_ptr<Memory> window_;
  Nonce nonce_{};
  std::vector<std::shared_ptr<Memory>> peers_;
  std::shared_ptr<Memory> own_rail_;  // for loopback; with UCX the region owns its memory
  std::unique_ptr<UcxRegion> region_;
  HostState host_;
  uint64_t number_ = 0;
  bool continues_ = false;  // without masked ranks, although the communicator is broken
  Status broken_;           // its own failure, if it continues
  std::vector<RoleSpan> timeline_;
  LoopbackRail loopback_;
  UcxRail ucx_rail_;
};

}  // namespace moecomm
