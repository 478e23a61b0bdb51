// SimCluster: all ranks of a simulated world, their windows, plans and arenas, and the programs they run.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "fabric/sim_mutant.hpp"
#include "runtime/memory.hpp"
#include "runtime/plan.hpp"

namespace moecomm {

struct SimConfig {
  int size = 1;
  int ranks_per_node = 1;
  int num_sms = 20;
  Shape shape;
  Hardware hardware;
  bool payload = false;
};

enum class SimVerb : int32_t { dispatch, combine };

// One rank's part in a call. Without payload, x, rows and y are left out.
struct SimPart {
  int32_t tokens = 0;
  const int64_t* ids = nullptr;       // dispatch; null: the plan of this handle is reused
  const float* weights = nullptr;     // [T, K] in dispatch, [N] in combine
  const char* x = nullptr;
  const char* scales = nullptr;
  const char* rows = nullptr;         // combine; null: the experts hand back what they got
  const float* bias = nullptr;
  int64_t bias_stride = 0;
  char* y = nullptr;                  // null: into memory of the cluster
};

// Every rank runs the same calls; each as soon as it has finished the one before.
struct SimCall {
  SimVerb verb = SimVerb::dispatch;
  int handle = 0;                     // by number: dispatch fills it, combine empties it
  bool keep = false;                  // combine: the handle's rows stay where they are
  bool echo_weights = false;          // combine: weighted by what dispatch brought
  double before = 0;                  // nanoseconds that the rank computes before the call
  CallShape shape;
  std::vector<SimPart> parts;         // by rank
};

struct SimResult {
  Time begin = 0, end = 0;
  Status status;
  bool ran = false;
  uint64_t digest = 0;                // of what the call delivered (payload only)
};

class SimCluster {
 public:
  explicit SimCluster(const SimConfig& config);

  // A clean start: windows, counters and the clock; handles are dropped.
  void reset(const Chaos& chaos, int poison = SimNet::kPoison);
  // Results by call and rank. Waits that nobody would end give up.
  const std::vector<SimResult>& run(const std::vector<SimCall>& program, const Mutation& mutation = {});
  const std::vector<SimResult>& results() const { return results_; }

  SimNet& net() { return *net_; }
  const SimConfig& config() const { return config_; }
  const BufferView& view(int rank) const { return ranks_[rank].view; }
  const Plan* plan(int rank, int handle) const;
  const char* block(int rank, int handle) const;        // what dispatch delivered, laid out by block_layout
  uint64_t rows(int rank, int handle) const;
  uint64_t events() const { return net_->fibers().switches(); }

 private:
  struct Handle {
    std::shared_ptr<Plan> plan;
    uint64_t offset = 0;    // of the block in the window
    uint64_t bytes = 0;     // of block and output; 0: not held
    uint64_t first = 0;     // of the block alone
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
  };
  template <class F> void run_rank(int rank, F fabric, const std::vector<SimCall>& program);
  template <class F> Status dispatch(int rank, F fabric, const SimCall& call, Handle& handle);
  template <class F> Status combine(int rank, F fabric, const SimCall& call, Handle& handle, uint64_t& digest);
  void release(RankState& r, Handle& handle);
  uint64_t digest_block(int rank, const Handle& handle) const;

  SimConfig config_;
  std::unique_ptr<SimNet> net_;
  std::vector<RankState> ranks_;
  std::vector<SimResult> results_;
};

// What exploring found.
struct Finding {
  bool found = false;
  uint64_t schedules = 0;      // that were run
  uint64_t seed = 0;
  uint64_t perturbations = 0;  // the fewest with which the failure was seen again
  int call = -1, rank = -1;    // where
  std::string what;
  std::vector<LogLine> log;
  std::vector<Role> stuck;
};

// Runs `count` schedules of the program, seeds from `first_seed`; stops at the first that deadlocks, fails
// or delivers anything else than the schedule without chaos.
Finding explore(SimCluster& cluster, const std::vector<SimCall>& program, const Mutation& mutation, uint64_t first_seed, uint64_t count);

}  // namespace moecomm
