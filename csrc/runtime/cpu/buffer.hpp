// Buffer: owns a rank's window and rail region, and runs its calls. Calls hold the Communicator's lock, so
// they do not interleave.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/cpu/communicator.hpp"
#include "runtime/cpu/first_phase.hpp"
#include "runtime/cpu/peer_memory.hpp"
#include "runtime/cpu/recording.hpp"
#include "runtime/memory.hpp"
#include "runtime/plan.hpp"
#include "session/calls.hpp"

namespace moecomm {

class Buffer {
 public:
  Buffer(std::shared_ptr<Communicator> comm, Shape shape, bool check);
  static uint64_t bytes(const Geometry& g, const Shape& s);  // of node window and rail region together

  std::string contact() const { return peer_memory_.contact(); }
  void connect(const std::vector<std::string>& contacts) { peer_memory_.connect(contacts); }
  bool rail_is_mapped() const { return peer_memory_.rail_is_mapped(); }
  void finish_connect() {
    peer_memory_.finish_connect();
  }  // call after a barrier, when all ranks have mapped all memory

  std::shared_ptr<Plan> new_plan() { return pool_->get(); }
  // On success `out` has the dispatched rows, and `output` is the memory for the experts' output. With
  // `first`, both and the plan's counts are available once it reports `placed`, while the rows are still in
  // flight.
  Status dispatch(const DispatchCall& call, Plan& plan, std::shared_ptr<Block>& out,
                  std::shared_ptr<Block>& output, FirstPhase* first = nullptr);
  Status combine(const CombineCall& call, Plan& plan, const Block& output);
  // Replaces a combine: this rank only announces that it refuses its part. (For a dispatch: Tokens::refused.)
  Status refuse_combine(Why why);
  // Chooses the expert slots of a batch without a dispatch. Exchanges counts if the choice needs those of all
  // ranks.
  Status choose(const DispatchCall& call);
  int64_t local_rows(const Plan& plan) const {  // of the dispatch's result at this rank
    return moecomm::local_rows(view_, plan.view);
  }

  Communicator& comm() const { return *comm_; }
  const BufferView& view() const { return view_; }
  const Arena& arena() const { return *arena_; }
  const Memory& window() const { return *peer_memory_.window(); }
  Counters counters();       // since the last take_counters()
  Counters take_counters();  // and resets them
  void trace(bool on);       // starts a timeline of roles, or drops it
  std::vector<RoleSpan> take_timeline();
  // Sets the recording of calls and their roles; null: none. Segments are taken only between two calls.
  void record(std::shared_ptr<Recording> recording);
  Recording::Segment take(Recording& recording);
  void set_stream_threshold(uint64_t bytes) { stream_threshold_ = bytes; }
  void set_fault(Fault fault) {
    peer_memory_.host().fault = std::move(fault);
  }  // tests only: see fabric/cpu/fault.hpp

 private:
  void begin_call(Verb verb, uint64_t bytes_moved);
  // Counts the picks of a call with a choice, and sets up `made`, the same call by expert slots. Returns true
  // if the picks of all ranks are needed; logical_blocks_ then has this rank's. Returns false if the slots
  // have been chosen, or if a pick is invalid and the rank refuses its part.
  bool ask(const DispatchCall& call, DispatchCall& made, Status& bad);

  // Its share of the bytes that the Buffers of a communicator populate at start.
  struct Populated {
    Populated(Communicator& comm, uint64_t wanted);
    ~Populated() { comm.return_populated(bytes); }
    Populated(const Populated&) = delete;
    Populated& operator=(const Populated&) = delete;
    Communicator& comm;
    uint64_t bytes;
  };

  std::shared_ptr<Communicator> comm_;
  BufferView view_;
  Populated populated_;
  PeerMemory peer_memory_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<PlanPool> pool_;
  Consumed consumed_;
  std::vector<uint64_t> consumed_counts_;
  std::vector<int32_t> logical_blocks_;  // DispatchArgs::logical_blocks
  int32_t rotation_ = 0;                 // number of batches whose replicas this rank has chosen by itself
  std::shared_ptr<Recording> recording_;
  uint64_t stream_threshold_ = 7u << 20;
};

}  // namespace moecomm
