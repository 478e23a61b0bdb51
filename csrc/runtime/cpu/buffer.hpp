// Buffer: owns a rank's windows and runs its calls. One lock per Communicator: calls do not interleave.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/calls.hpp"
#include "runtime/cpu/communicator.hpp"
#include "runtime/cpu/reach.hpp"
#include "runtime/cpu/recording.hpp"
#include "runtime/memory.hpp"
#include "runtime/plan.hpp"

namespace moecomm {

class Buffer {
 public:
  Buffer(std::shared_ptr<Communicator> comm, Shape shape, bool check);
  static uint64_t bytes(const Geometry& g, const Shape& s);  // of node window and rail region

  std::string card() const { return reach_.card(); }
  void connect(const std::vector<std::string>& cards) { reach_.connect(cards); }
  bool rail_is_mapped() const { return reach_.rail_is_mapped(); }
  void connected() { reach_.connected(); }  // after a barrier: everybody has mapped everything

  std::shared_ptr<Plan> new_plan() { return pool_->get(); }
  // On ok, `out` holds the dispatched rows and `output` the place for the experts' rows.
  Status dispatch(const DispatchCall& call, Plan& plan, std::shared_ptr<Block>& out,
                  std::shared_ptr<Block>& output);
  Status combine(const CombineCall& call, Plan& plan, const Block& output);
  // In the place of a combine: this rank takes no part but to tell the others. (A dispatch says it in its
  // call.)
  Status refuse_combine(Why why);
  // The slots of a batch that goes on another way: an exchange of counts by itself where the choice needs
  // those of all ranks.
  Status choose(const DispatchCall& call);
  int64_t local_rows(const Plan& plan) const {  // of the dispatch's result here
    return plan.view.call.capacity >= 0 ? plan.view.call.capacity
                                        : plan.view.rank_rows[view_.geometry.local()];
  }

  Communicator& comm() const { return *comm_; }
  const BufferView& view() const { return view_; }
  const Arena& arena() const { return *arena_; }
  const Memory& window() const { return *reach_.window(); }  // which peers read
  Counters counters();                                       // since the last take_counters
  Counters take_counters();                                  // and reset
  void trace(bool on);                                       // keep a timeline of roles, or drop it
  std::vector<RoleSpan> take_timeline();
  // Keep a recording of the calls and their roles; null: none. It is taken apart only between two calls.
  void record(std::shared_ptr<Recording> recording);
  Recording::Segment take(Recording& recording);
  void set_stream_threshold(uint64_t bytes) { stream_threshold_ = bytes; }
  void set_fault(Fault fault) {
    reach_.host().fault = std::move(fault);
  }  // tests only: see fabric/cpu/fault.hpp

 private:
  void begin_call(Verb verb, uint64_t bytes_moved);
  // Counts the picks of call.choice. True: all ranks' picks are needed, and `a` asks for them; false: the
  // slots are chosen, or the picks are bad.
  bool ask(const DispatchCall& call, DispatchArgs& a, Status& bad);

  std::shared_ptr<Communicator> comm_;
  BufferView view_;
  Reach reach_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<PlanPool> pool_;
  Book book_;
  std::vector<uint64_t> book_counts_;
  std::vector<int32_t> asked_;  // DispatchArgs::asked
  int32_t turn_ = 0;            // batches whose replicas this rank has chosen by itself
  std::shared_ptr<Recording> recording_;
  uint64_t stream_threshold_ = 7u << 20;
};

}  // namespace moecomm
