// SimDomain: the verbs of a Domain on the virtual clock, to predict times and for exploration.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "fabric/sim/mutant.hpp"
#include "runtime/domain.hpp"

namespace moecomm {

struct SimDomainConfig {
  int size = 1;
  int ranks_per_node = 1;
  int num_sms = 20;
  uint64_t heap_bytes = 0;
  Hardware hardware;
  bool payload = false;
};

enum class SimDomainVerb : int32_t { multicast, reduce, ring };

// One multicast or reduction of `count` contiguous segments of `bytes` bytes. shared, own: offsets in the
// heap; own is the root's source, or the place of its sum.
struct SimGroup {
  int32_t root = 0;
  std::vector<int32_t> ranks;
  uint64_t shared = 0, own = 0;
  uint64_t bytes = 0;
  int64_t count = 1;
};

// Every rank runs the same calls. ring: after a barrier each rank writes the group's segments from its `own`
// to `shared` of the rank `root` places after it, and waits for the segments written to it.
struct SimDomainCall {
  SimDomainVerb verb = SimDomainVerb::multicast;
  std::vector<SimGroup> groups;
  uint8_t odd = 0;  // 1 + a rank that makes another call, or 129 + a rank that refuses
};

struct SimDomainResult {
  Time begin = 0, end = 0;
  Status status;
  uint64_t digest = 0;  // of the rank's heap (payload only)
};

struct SimDomainFinding {
  bool found = false;
  uint64_t schedules = 0, seed = 0;
  int call = -1, rank = -1;
  std::string what;
};

class SimDomain {
 public:
  explicit SimDomain(const SimDomainConfig& config);

  // Restores the initial state. With payload the heap has different numbers on every rank.
  void reset(const Chaos& chaos);
  const std::vector<SimDomainResult>& run(const std::vector<SimDomainCall>& program,
                                          const Mutation& mutation = {});
  // Compares `count` schedules, with seeds from first_seed on, with the schedule without chaos.
  SimDomainFinding explore(const std::vector<SimDomainCall>& program, const Mutation& mutation,
                           uint64_t first_seed, uint64_t count);

  // Runs role(rank, fabric, view, consumed), which returns a Status, on every rank. Does not reset the clock.
  // Returns the Status of each rank.
  template <class Role>
  std::vector<Status> run_role(Role&& role) {
    std::vector<Status> all(config_.size);
    for (int rank = 0; rank < config_.size; ++rank)
      net_->start(rank, "rank", -1, moecomm::Role::kAllSms, [this, rank, &role, &all] {
        all[rank] = role(rank, SimFabric{net_.get(), rank, 0}, view(rank), &ranks_[rank].counts->consumed);
        net_->flush();
        net_->fibers().advance(net_->fibers().now() + 1);  // data that arrives at this moment has been read
      });
    net_->run();
    return all;
  }

  SimNet& net() { return *net_; }
  char* heap(int rank) { return net_->window(0, rank, view(rank).at.heap.value); }

 private:
  struct RankState {
    DomainView view;
    std::unique_ptr<DomainCounts> counts;
    uint64_t rung = 0;  // segments that arrived by rings
  };
  const DomainView& view(int rank) const { return ranks_[rank].view; }
  template <Fabric<Lane> F>
  void run_rank(int rank, F f, const std::vector<SimDomainCall>& program);
  template <Fabric<Lane> F>
  Status call(int rank, F f, const SimDomainCall& c);
  template <Fabric<Lane> F>
  Status ring(int rank, F f, const SimGroup& g);
  void overwrite(int rank, const SimDomainCall& c);
  std::vector<Segment> segments(int rank, const SimGroup& g, bool here);

  SimDomainConfig config_;
  std::unique_ptr<SimNet> net_;
  std::vector<RankState> ranks_;
  std::vector<SimDomainResult> results_;
};

}  // namespace moecomm
