// Decode: owns the memory of the decode path and runs its four phases. It uses session/turns.hpp, so a caller
// may leave out a hook or a combine.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/cpu/peer_memory.hpp"
#include "runtime/cpu/recording.hpp"
#include "session/decode_arguments.hpp"
#include "session/turns.hpp"

namespace moecomm {

class Decode {
 public:
  Decode(std::shared_ptr<Communicator> comm, Shape shape, bool check);
  static uint64_t bytes(const Geometry& g, const Shape& s);  // of window and region

  std::string contact() const { return peer_memory_.contact(); }
  void connect(const std::vector<std::string>& contacts) { peer_memory_.connect(contacts); }
  void finish_connect() { peer_memory_.finish_connect(); }

  // Waits only if rules (A) and (B) require it. On success `epoch` is the epoch of the new dispatch.
  Status dispatch(const DecodeDispatchCall& call, uint64_t& epoch);
  Status dispatch_receive(uint64_t epoch);  // returns at once if it has been received already
  Status combine(const DecodeCombineCall& call);
  Status combine_receive(uint64_t epoch);
  // Replaces a combine: this rank only announces that it refuses its part. Does nothing if the epoch is not
  // open for a combine.
  Status refuse_combine(uint64_t epoch, Why why);

  // To continue without dead ranks, every remaining rank calls rest(), they exchange the results, call mask()
  // for the same ranks, and have a barrier before the next step.
  uint64_t rest();  // the highest epoch that this rank may have used; it must not be in a call
  // masked: by rank, not 0: masked. Earlier steps have no result. latest, calls: the maximum over all
  // remaining ranks.
  void mask(const std::vector<uint8_t>& masked, uint64_t latest, uint64_t calls);

  uint64_t epoch() const { return order_.latest(); }  // the epoch of the latest dispatch
  DecodeStage stage(uint64_t epoch) const { return order_.stage(epoch); }
  bool weighted(uint64_t epoch) const { return turns_[epoch & 1].view.weighted; }

  const Memory& window() const { return *peer_memory_.window(); }
  // The memory of tensors, by parity. Valid as long as the Decode.
  char* x(int parity) const { return peer_memory_.window()->data() + view_.x(parity); }
  char* scales(int parity) const { return peer_memory_.window()->data() + view_.scales(parity, 0); }
  char* rows(int parity) const { return peer_memory_.window()->data() + view_.rows(parity); }
  int64_t* counts(int parity) const { return view_.counts(parity).in(peer_memory_.window()->data()); }
  int64_t packed_rows() const { return static_cast<int64_t>(view_.packed_rows()); }
  int64_t scale_area() const {  // of one expert
    return static_cast<int64_t>(decode_scale_area(view_.geometry, view_.shape));
  }
  int num_local_experts() const { return view_.experts_per_rank(); }

  Communicator& comm() const { return peer_memory_.comm(); }

  // For DecodeFloor, which repeats the traffic of the last step.
  PeerMemory& peer_memory() { return peer_memory_; }
  const DecodeView& view() const { return view_; }
  const DecodeTurn& last_turn() const { return turns_[epoch() & 1].view; }
  void skip_to(uint64_t epoch) { order_.skip_to(epoch); }
  // Whether to use non-temporal stores.
  bool streams(uint64_t bytes) const { return bytes >= stream_threshold_; }

  Counters counters();       // since the last take_counters()
  Counters take_counters();  // and resets them
  void trace(bool on);       // starts a timeline of roles, or drops it
  std::vector<RoleSpan> take_timeline();
  void record(std::shared_ptr<Recording> recording);  // that of the Buffer; null: none
  void set_stream_threshold(uint64_t bytes) { stream_threshold_ = bytes; }
  void set_fault(Fault fault) {
    peer_memory_.host().fault = std::move(fault);
  }  // tests only: see fabric/cpu/fault.hpp

 private:
  struct Turn {
    DecodeTurn view;
    DecodeAnswer answer{};
    Status outcome;  // of the latest receive phase
    std::unique_ptr<char[]> memory;
  };
  Turn& turn(uint64_t epoch) { return turns_[epoch & 1]; }
  // Estimates the received bytes by the sent ones, so that no count is needed.
  bool streams(const Turn& t, uint64_t row_bytes) const {
    return streams(uint64_t(t.view.tokens) * view_.shape.top_k * row_bytes);
  }
  Status receive(Turn& t);
  Status sum(Turn& t);
  Status refuse_combine(Turn& t, Why why);
  Status begin_combine(Turn& t);
  Status recorded(RecordedOp op, uint64_t epoch, Status (Decode::*phase)(Turn&));
  void stage_rows(const Turn& t, const char* rows);

  DecodeView view_;
  PeerMemory peer_memory_;
  DecodeTurns order_;
  Turn turns_[2];  // by parity
  std::vector<uint8_t> masked_;
  int lost_ = -1;             // a masked rank
  uint64_t before_mask_ = 0;  // the latest epoch from before the mask
  std::shared_ptr<Recording> recording_;
  uint64_t stream_threshold_ = 7u << 20;
};

}  // namespace moecomm
