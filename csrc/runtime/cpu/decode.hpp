// Decode: owns the memories of the decode path and runs its four phases; keeps the rules (A) and (B) of
// protocol/decode.hpp, so a caller may leave out a hook or a combine.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "protocol/decode.hpp"
#include "runtime/calls.hpp"
#include "runtime/cpu/reach.hpp"
#include "runtime/cpu/recording.hpp"

namespace moecomm {

class Decode {
 public:
  enum Stage : int { idle, sent, received, answered, done };

  Decode(std::shared_ptr<Communicator> comm, Shape shape, bool check);
  static uint64_t bytes(const Geometry& g, const Shape& s);  // of window and region

  std::string card() const { return reach_.card(); }
  void connect(const std::vector<std::string>& cards) { reach_.connect(cards); }
  void connected() { reach_.connected(); }

  // Waits only for what the two rules ask for; on ok, `epoch` is the new dispatch.
  Status dispatch(const DecodeDispatchCall& call, uint64_t& epoch);
  Status dispatch_receive(uint64_t epoch);  // at once where it is received already
  Status combine(const DecodeCombineCall& call);
  Status combine_receive(uint64_t epoch);
  // In the place of a combine: this rank takes no part but to tell the others. Nothing where the epoch is not
  // open for one.
  Status refuse_combine(uint64_t epoch, Why why);

  uint64_t epoch() const { return epoch_; }  // of the latest dispatch
  Stage stage(uint64_t epoch) const;         // idle: the epoch's places are used by a later one
  bool weighted(uint64_t epoch) const { return turns_[epoch & 1].view.weighted; }

  const Memory& window() const { return *reach_.window(); }  // which peers read
  // Memory of a parity, for tensors: as long as the Decode lives.
  char* x(int parity) const { return reach_.window()->data() + view_.x(parity); }
  char* scales(int parity) const { return reach_.window()->data() + view_.scales(parity, 0); }
  char* rows(int parity) const { return reach_.window()->data() + view_.rows(parity); }
  int64_t* counts(int parity) const { return view_.counts(parity).in(reach_.window()->data()); }
  int64_t packed_rows() const { return static_cast<int64_t>(view_.packed_rows()); }
  int64_t scale_area() const {
    return static_cast<int64_t>(decode_scale_area(view_.geometry, view_.shape));
  }  // of one expert
  int num_local_experts() const { return view_.experts_per_rank(); }

  Communicator& comm() const { return reach_.comm(); }

  // For DecodeFloor, which repeats the last step's traffic on its own.
  Reach& reach() { return reach_; }
  const DecodeView& view() const { return view_; }
  const DecodeTurn& last_turn() const { return turns_[epoch_ & 1].view; }
  void skip_to(uint64_t epoch) { epoch_ = epoch; }
  bool streams(uint64_t bytes) const { return bytes >= stream_threshold_; }  // past the caches

  Counters counters();       // since the last take_counters
  Counters take_counters();  // and reset
  void trace(bool on);       // keep a timeline of roles, or drop it
  std::vector<RoleSpan> take_timeline();
  void record(std::shared_ptr<Recording> recording);  // the Buffer's; null: none
  void set_stream_threshold(uint64_t bytes) { stream_threshold_ = bytes; }
  void set_fault(Fault fault) {
    reach_.host().fault = std::move(fault);
  }  // tests only: see fabric/cpu/fault.hpp

 private:
  struct Turn {
    DecodeTurn view;
    Stage stage = Stage::idle;
    int32_t combine_mode = 0;
    Wire wire = Wire::plain;
    char* y = nullptr;
    Why refused = Why::none;  // its combine, by this rank
    Status outcome;           // of its latest receive phase
    std::unique_ptr<char[]> memory;
  };
  Turn& turn(uint64_t epoch) { return turns_[epoch & 1]; }
  // A rank receives about as much as it sends: the estimate needs no count.
  bool streams(const Turn& t, uint64_t row_bytes) const {
    return streams(uint64_t(t.view.tokens) * view_.shape.top_k * row_bytes);
  }
  Status receive(Turn& t);
  Status sum(Turn& t);
  Status refuse_combine(Turn& t, Why why);
  Status recorded(RecordedOp op, uint64_t epoch, Status (Decode::*phase)(Turn&));
  void stage_rows(const Turn& t, const char* rows);

  DecodeView view_;
  Reach reach_;
  uint64_t epoch_ = 0;
  Turn turns_[2];
  std::shared_ptr<Recording> recording_;
  uint64_t stream_threshold_ = 7u << 20;
};

}  // namespace moecomm
