// Reach: the two memories of a rank that others see (node window and rail region), theirs as far as this
// rank reaches them, and how a call runs over both. A Buffer has one for dispatch and combine, decode its
// own.
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

// How large the memories are, and where in them the runtime finds what it needs itself.
struct ReachPlan {
  uint64_t window_bytes = 0;
  Offset<FaultWord> window_faults;  // per local rank
  uint64_t warm_bytes = 0;          // of every window mapping: pages made ready at start
  uint64_t region_bytes = 0;
  uint64_t region_counters = 0;     // counters lie in the first region_counters bytes
  Offset<FaultWord> region_faults;  // per region peer
  Offset<FaultWord> fault_out;      // on its way out
  std::vector<int> peers;           // the fabric's peers by index: their ranks, -1: not over the region
  int own = 0;                      // this rank's index among the peers
};

// Lies at the end of every window and travels in its card: whoever maps a window sees that it is the one that
// was meant.
using Nonce = std::array<uint64_t, 2>;

class Reach {
 public:
  Reach(std::shared_ptr<Communicator> comm, ReachPlan plan);
  ~Reach();
  Reach(const Reach&) = delete;
  Reach& operator=(const Reach&) = delete;

  // Collective in three steps: construct, connect with everyone's card, connected after a barrier.
  std::string card() const;
  void connect(const std::vector<std::string>& cards);
  void connected();

  const std::shared_ptr<Memory>& window() const { return window_; }
  bool rail_is_mapped() const;  // whether stores reach the rail peers' regions without the network
  Communicator& comm() const { return *comm_; }
  HostState& host() { return host_; }

  uint64_t number() const { return number_; }  // among the communicator's; equal on all ranks
  void tell(FaultWord word);                   // to everyone within reach

  void trace(bool on);  // keep a timeline of roles, or drop it
  std::vector<RoleSpan> take_timeline() { return std::exchange(timeline_, {}); }

  // stream: the call moves more than the caches hold.
  void begin(bool stream);
  // Runs call(fabric). drain: also waits until the sources of its puts may be overwritten. A failure that
  // is final is told to everyone within reach and to the communicator.
  template <class Call>
  Status run(bool drain, Call&& call) {
    if (const Status broken = comm_->broken(); !broken.ok()) return broken;
    Status s = region_ ? call(HostFabric<UcxRail>{&host_, &ucx_rail_})
                       : call(HostFabric<LoopbackRail>{&host_, &loopback_});
    if (!comm_->calls().is_here())
      return s;  // a signal handler forked, and its child came back into the call: it is no rank
    if (region_ && drain && !is_final(s) &&
        s.code != Code::interrupted)  // a refused call's puts too: others may not have read them yet
      if (const Status unread = flush(); !unread.ok()) s = unread;
    Status told = s;
    if (s.code == Code::interrupted) told.code = Code::lost;  // this rank, as the others see it
    if (is_final(told)) {
      report_fault(told);
      comm_->mark_broken(told);
    }
    return s;
  }

 private:
  Status flush();
  void report_fault(const Status& s);

  std::shared_ptr<Communicator> comm_;
  ReachPlan plan_;
  std::shared_ptr<Memory> window_;
  Nonce nonce_{};
  std::vector<std::shared_ptr<Memory>> peers_;
  std::shared_ptr<Memory> own_rail_;  // loopback; under UCX the region owns its memory
  std::unique_ptr<UcxRegion> region_;
  HostState host_;
  uint64_t number_ = 0;
  std::vector<RoleSpan> timeline_;
  LoopbackRail loopback_;
  UcxRail ucx_rail_;
};

}  // namespace moecomm
