// SimCluster: all ranks of a simulated job, with their windows, plans and arenas. It runs programs of calls.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "balance/replica_policy.hpp"
#include "fabric/sim/mutant.hpp"
#include "runtime/memory.hpp"
#include "runtime/plan.hpp"
#include "runtime/sim/decode.hpp"
#include "session/arena.hpp"
#include "session/calls.hpp"

namespace moecomm {

// The schedule of a rank's roles: a fiber per role and channel; one lane that runs them one after another, as
// in the cpu world; or concurrent groups with latches between them, as in the cuda world.
enum class SimSchedule : int32_t { roles, lane, groups };

struct SimConfig {
  int size = 1;
  int ranks_per_node = 1;
  int num_sms = 20;
  Shape shape;
  Hardware hardware;
  bool payload = false;
  bool decode = false;  // also allocate the memory of the decode path
  SimSchedule schedule = SimSchedule::roles;
  int workers = 1;                 // groups that divide a decode phase of a rank; workers of `groups`
  std::vector<int32_t> placement;  // the logical expert in every expert slot, if shape.logical_experts is set
};

// A program may leave out decode's receive phases; rules (A) and (B) then run them later.
// choose: only chooses the expert slots of a batch. decode_mask: absent ranks are
// dead; the other ranks mask them and continue.
enum class SimVerb : int32_t {
  dispatch,
  combine,
  decode_dispatch,
  decode_receive,
  decode_combine,
  decode_sum,
  choose,
  decode_mask
};

// One rank's part in a call. Without payload, x, rows and y are ignored.
struct SimPart {
  int32_t tokens = 0;
  const int64_t* ids = nullptr;  // dispatch; null: the plan of this handle is reused
  const float* weights =
      nullptr;  // [T, K] in dispatch (in decode: they are sent) and decode_combine; [N] in combine
  const char* x = nullptr;
  const char* scales = nullptr;
  const char* rows = nullptr;  // combine; null: the experts return the rows that they got
  const float* bias = nullptr;
  int64_t bias_stride = 0;
  char* y = nullptr;         // null: memory of the cluster
  int64_t* slots = nullptr;  // [T, K] out: set if ids are logical and replicas are chosen by the picks of all
  int32_t* counted = nullptr;  // [logical experts] out: picks per expert
  uint32_t routing = 0;        // as in CallShape
  Why refused = Why::none;     // the rank refuses its part in the call
  bool strays = false;  // the rank makes another call, which it refuses: a combine instead of a dispatch, or
                        // a dispatch instead of a combine
  bool absent = false;  // the rank does not make this call
};

// Every rank runs the same calls, each as soon as it has finished the previous one.
struct SimCall {
  SimVerb verb = SimVerb::dispatch;
  int handle = 0;     // number of the handle that dispatch sets and combine frees; decode: dispatches ago
  bool keep = false;  // combine: do not free the handle
  uint8_t flip = 0;   // combine: bits that the experts flip in the rows that they return
  // dispatch: the rows are quantized and have scales; else the call quantizes them.
  bool scales_given = false;
  Wire wire = Wire::plain;                      // combine
  bool echo_weights = false;                    // combine: use the weights that dispatch delivered
  double before = 0;                            // nanoseconds that the rank computes before the call
  balance::Mode mode = balance::Mode::optimal;  // of parts with slots
  int activate = 0;
  CallShape shape;
  std::vector<SimPart> parts;  // by rank
};

struct SimResult {
  Time begin = 0, end = 0;
  Status status;
  bool ran = false;
  uint64_t digest = 0;  // of the data that the call delivered (payload only)
};

class SimCluster {
 public:
  explicit SimCluster(const SimConfig& config);

  // Restores the initial state of windows, counters and the clock; drops handles.
  void reset(const Chaos& chaos, double lead = 0, int poison = SimNet::kPoison);
  // Returns results by call and rank. In a deadlock the waits give up.
  const std::vector<SimResult>& run(const std::vector<SimCall>& program, const Mutation& mutation = {});
  const std::vector<SimResult>& results() const { return results_; }

  SimNet& net() { return *net_; }
  const SimConfig& config() const { return config_; }
  const BufferView& view(int rank) const { return ranks_[rank].view; }
  SimDecode& decode(int rank) { return *ranks_[rank].decode; }
  const Plan* plan(int rank, int handle) const;
  const char* block(int rank, int handle) const;  // the block that dispatch delivered; see block_layout()
  uint64_t rows(int rank, int handle) const;
  uint64_t events() const { return net_->fibers().switches(); }

 private:
  struct Handle {
    std::shared_ptr<Plan> plan;
    Piece piece{};
    HeldPiece<SimNet> held;
    uint64_t rows = 0;
    uint64_t digest = 0;
  };
  struct RankState {
    BufferView view;
    std::shared_ptr<Arena> arena;
    std::shared_ptr<PlanPool> pool;
    Consumed consumed;
    std::vector<uint64_t> consumed_counts;
    std::vector<Handle> handles;
    std::vector<char> y;
    std::unique_ptr<SimDecode> decode;
    std::vector<char> decode_y[2];
    uint64_t decode_digest = 0;
    std::vector<int32_t> logical_blocks;  // DispatchArgs::logical_blocks
    bool chosen = false;                  // whether replicas have been chosen in this call
  };
  struct Rest;
  class MutantChooser;
  MutantFabric mutant(const SimFabric& fabric, const RankState& r) const;
  template <Fabric<Lane> F>
  void run_rank(int rank, F fabric, const std::vector<SimCall>& program);
  template <Fabric<Lane> F>
  Status dispatch(int rank, F fabric, const SimCall& call, Handle& handle);
  template <Fabric<Lane> F>
  Status combine(int rank, F fabric, const SimCall& call, Handle& handle, uint64_t& digest);
  template <Fabric<Lane> F>
  Status refuse_combine(int rank, F fabric);
  template <Fabric<Lane> F>
  Status run_on_schedule(F fabric, const CombineArgs& a);
  template <Fabric<Lane> F>
  Status choose(int rank, F fabric, const DispatchCall& call);
  DispatchCall call_of(int rank, const SimCall& call);
  template <Fabric<Lane> F>
  Status call_main(int rank, F fabric, const SimCall& call, SimResult& result);
  template <Fabric<Lane> F>
  Status call_decode(int rank, F fabric, const SimCall& call, SimResult& result);
  template <Fabric<Lane> F>
  void mask(int rank, F fabric, const SimCall& call);
  uint64_t digest_block(int rank, const Handle& handle) const;
  uint64_t digest_packed(int rank) const;

  SimConfig config_;
  std::shared_ptr<SimNet> net_;
  std::vector<RankState> ranks_;
  std::vector<SimResult> results_;
  std::map<std::pair<balance::Mode, int>, balance::ReplicaPolicy> choices_;
  std::map<const SimCall*, std::shared_ptr<Rest>> rests_;  // of the run
  Mutation mutation_;                                      // of the run
};

}  // namespace moecomm
