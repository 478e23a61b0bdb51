// SimCluster: all ranks of a simulated world, their windows, plans and arenas, and the programs they run.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "balance/choice.hpp"
#include "fabric/sim/mutant.hpp"
#include "runtime/calls.hpp"
#include "runtime/memory.hpp"
#include "runtime/plan.hpp"
#include "runtime/sim/decode.hpp"

namespace moecomm {

// Who runs a rank's roles: a fiber per role and channel; one lane that runs them one after another as in the
// cpu world; or seats with gates between them as in the cuda world.
enum class SimSchedule : int32_t { roles, lane, seats };

struct SimConfig {
  int size = 1;
  int ranks_per_node = 1;
  int num_sms = 20;
  Shape shape;
  Hardware hardware;
  bool payload = false;
  bool decode = false;  // the decode path's memories too
  SimSchedule schedule = SimSchedule::roles;
  int workers = 1;                 // roles that share a decode phase of a rank, or its seats
  std::vector<int32_t> placement;  // the logical expert in every slot, where shape.logical_experts are fewer
};

// Decode's receive phases may be left out of a program: the rules (A) and (B) make up for them.
// choose: which slots a batch takes, and nothing else.
enum class SimVerb : int32_t {
  dispatch,
  combine,
  decode_dispatch,
  decode_receive,
  decode_combine,
  decode_sum,
  choose
};

// One rank's part in a call. Without payload, x, rows and y are left out.
struct SimPart {
  int32_t tokens = 0;
  const int64_t* ids = nullptr;  // dispatch; null: the plan of this handle is reused
  const float* weights =
      nullptr;  // [T, K] in dispatch (in decode: then they travel) and decode_combine, [N] in combine
  const char* x = nullptr;
  const char* scales = nullptr;
  const char* rows = nullptr;  // combine; null: the experts hand back what they got
  const float* bias = nullptr;
  int64_t bias_stride = 0;
  char* y = nullptr;           // null: into memory of the cluster
  int64_t* slots = nullptr;    // [T, K] out: ids are logical, replicas are chosen by the picks of all
  int32_t* counted = nullptr;  // [logical experts] out: those picks
  uint32_t routing = 0;        // ranks that differ in it make different calls
  Why refused = Why::none;     // the rank refuses its part in the call
  bool strays =
      false;  // the rank makes another call: a combine for a dispatch, or the reverse, which it refuses, too
};

// Every rank runs the same calls; each as soon as it has finished the one before.
struct SimCall {
  SimVerb verb = SimVerb::dispatch;
  int handle = 0;     // by number: dispatch fills it, combine empties it; decode: how many dispatches ago
  bool keep = false;  // combine: the handle's rows stay where they are
  uint8_t flip = 0;   // combine: bits that the experts turn in what they hand back
  bool scales_given = false;  // dispatch: quantized rows come with their scales; else the call quantizes them
  Wire wire = Wire::plain;    // combine
  bool echo_weights = false;  // combine: weighted by what dispatch brought
  double before = 0;          // nanoseconds that the rank computes before the call
  balance::Mode mode = balance::Mode::optimal;  // of parts with slots
  int activate = 0;
  CallShape shape;
  std::vector<SimPart> parts;  // by rank
};

struct SimResult {
  Time begin = 0, end = 0;
  Status status;
  bool ran = false;
  uint64_t digest = 0;  // of what the call delivered (payload only)
};

class SimCluster {
 public:
  explicit SimCluster(const SimConfig& config);

  // A clean start: windows, counters and the clock; handles are dropped.
  void reset(const Chaos& chaos, double lead = 0, int poison = SimNet::kPoison);
  // Results by call and rank. Waits that nobody would end give up.
  const std::vector<SimResult>& run(const std::vector<SimCall>& program, const Mutation& mutation = {});
  const std::vector<SimResult>& results() const { return results_; }

  SimNet& net() { return *net_; }
  const SimConfig& config() const { return config_; }
  const BufferView& view(int rank) const { return ranks_[rank].view; }
  SimDecode& decode(int rank) { return *ranks_[rank].decode; }
  const Plan* plan(int rank, int handle) const;
  const char* block(int rank, int handle) const;  // what dispatch delivered, laid out by block_layout
  uint64_t rows(int rank, int handle) const;
  uint64_t events() const { return net_->fibers().switches(); }

 private:
  struct Handle {
    std::shared_ptr<Plan> plan;
    uint64_t offset = 0;  // of the block in the window
    uint64_t bytes = 0;   // of block and output
    bool held = false;
    uint64_t first = 0;  // of the block alone
    uint64_t rows = 0;
    uint64_t digest = 0;
  };
  struct RankState {
    BufferView view;
    std::unique_ptr<Arena> arena;
    std::shared_ptr<PlanPool> pool;
    Book book;
    std::vector<uint64_t> book_counts;
    std::vector<Handle> handles;
    std::vector<char> y;
    std::unique_ptr<SimDecode> decode;
    std::vector<char> decode_y[2];
    uint64_t decode_digest = 0;
    std::vector<int32_t> asked;  // DispatchArgs::asked
    bool chosen = false;         // in this call
  };
  class WatchedChooser;
  MutantFabric mutant(const SimFabric& fabric, const RankState& r) const;
  template <class F>
  void run_rank(int rank, F fabric, const std::vector<SimCall>& program);
  template <class F>
  Status dispatch(int rank, F fabric, const SimCall& call, Handle& handle);
  template <class F>
  Status combine(int rank, F fabric, const SimCall& call, Handle& handle, uint64_t& digest);
  template <class F>
  Status refuse_combine(int rank, F fabric);
  template <class F>
  Status run_on_schedule(F fabric, const CombineArgs& a);
  template <class F>
  Status choose(int rank, F fabric, DispatchArgs a, const DispatchCall& asked);
  DispatchCall asked_of(int rank, const SimCall& call, CallShape shape);
  template <class F>
  Status call_main(int rank, F fabric, const SimCall& call, SimResult& result);
  template <class F>
  Status call_decode(int rank, F fabric, const SimCall& call, SimResult& result);
  void release(RankState& r, Handle& handle);
  uint64_t digest_block(int rank, const Handle& handle) const;
  uint64_t digest_packed(int rank) const;

  SimConfig config_;
  std::unique_ptr<SimNet> net_;
  std::vector<RankState> ranks_;
  std::vector<SimResult> results_;
  std::map<std::pair<balance::Mode, int>, balance::Choice> choices_;
  Mutation mutation_;  // of the run
};

}  // namespace moecomm
