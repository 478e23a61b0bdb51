// DecodeTurns: the stages of a rank's two latest epochs of decode, and what the rank must do before the next
// dispatch. It follows rules (A) and (B) of protocol/decode.hpp, so a caller may leave out a hook or a
// combine. The turn of an epoch is what a rank remembers about it.
//
//             sent           received            answered           summed
//   idle ------------> sent ----------> received ----------> answered -------> done
//                        |                                      ^  |  answered  |
//                        |                                      '--|------------'
//                        |  with a failure: idle                   |  refused, or a peer's call differs: over
//                        |  this rank refused it: over
//
// It moves no data and never waits: a runtime runs the phases and reports each of them here. If a runtime
// enqueues kernels, a stage is what has been enqueued.
#pragma once
#include <cstdint>

#include "base/decode_layout.hpp"
#include "protocol/decode_stage.hpp"
#include "session/rules.hpp"

namespace moecomm {

class DecodeTurns {
 public:
  uint64_t latest() const { return latest_; }  // the epoch of the latest dispatch; 0: there is none
  uint64_t next() const { return latest_ + 1; }
  // idle: a later epoch uses the memory of this one, its dispatch has failed, or it belongs to another
  // capture.
  DecodeStage stage(uint64_t epoch, uint64_t capture = 0) const {
    const Turn& t = turn(epoch);
    return t.epoch == epoch && t.capture == capture ? t.stage : DecodeStage::idle;
  }
  // The number of combines of an epoch that have been sent: the number of its next one.
  int32_t combines(uint64_t epoch) const { return turn(epoch).combines; }

  // Call before dispatch next() is sent. Runs receive(epoch) if rule (A) requires it, then sum(epoch) if rule
  // (B) does. Both report to this object. Returns the first Status that is not ok.
  template <class Receive, class Sum, SessionRules R = EveryRule>
  Status before_dispatch(Receive receive, Sum sum, R rules = {}) {
    const Turn& last = turn(rules.keeps(Rule::count_by_ones) ? latest_ : latest_ + 1);
    if (!keeps_rule_a(last.stage) && rules.keeps(Rule::receive_last)) MOE_TRY(receive(last.epoch));
    const Turn& before = turn(next());
    if (!keeps_rule_b(before.stage) && rules.keeps(Rule::sum_before)) MOE_TRY(sum(before.epoch));
    return {};
  }

  // From here on the memory belongs to next(). capture: of the stream that it is enqueued on; 0: it runs now.
  void open(uint64_t capture = 0) { turn(next()) = {next(), DecodeStage::idle, capture, 0, false}; }
  void sent() { turn(++latest_).stage = DecodeStage::sent; }
  void received(uint64_t epoch, bool ok, bool refused) {
    turn(epoch).stage = !ok ? DecodeStage::idle : refused ? DecodeStage::over : DecodeStage::received;
  }
  // refused: this rank has sent its refusal instead of answers.
  void answered(uint64_t epoch, bool refused) {
    Turn& t = turn(epoch);
    t.stage = DecodeStage::answered;
    t.ends = refused;
    ++t.combines;
  }
  void summed(uint64_t epoch, bool ok) {
    Turn& t = turn(epoch);
    t.stage = ok && !t.ends && t.combines < kMostCombines ? DecodeStage::done : DecodeStage::over;
  }

  // Call before a dispatch on a stream. An epoch that was opened before a capture cannot be completed inside
  // it, so this is an error. Epochs that an earlier capture left open are dropped here; the
  // kernels check the rules again whenever that graph runs.
  Status enter(uint64_t capture) {
    for (Turn& t : turns_) {
      if (t.capture == capture) continue;
      if (t.capture == 0 && !keeps_rule_a(t.stage)) return wrong_stage(DecodeStage::received, t.stage);
      if (t.capture == 0 && !keeps_rule_b(t.stage)) return wrong_stage(DecodeStage::done, t.stage);
      t.stage = DecodeStage::idle;
    }
    return {};
  }

  // After a failure: no epoch is open.
  void drop() {
    for (Turn& t : turns_) t.stage = DecodeStage::idle;
  }
  // Epochs up to this one have been used, by this rank or by others.
  void skip_to(uint64_t epoch) { latest_ = epoch; }

 private:
  struct Turn {
    uint64_t epoch = 0;
    DecodeStage stage = DecodeStage::idle;
    uint64_t capture = 0;
    int32_t combines = 0;
    bool ends = false;  // after the combine that is under way
  };
  Turn& turn(uint64_t epoch) { return turns_[epoch & 1]; }
  const Turn& turn(uint64_t epoch) const { return turns_[epoch & 1]; }

  uint64_t latest_ = 0;
  Turn turns_[2];
};

// Only failures that leave the ranks out of step. After any other failure the ranks are still in step, and
// each rank gets it from the hook of its own call.
constexpr Status in_step(const Status& s) { return keeps_step(s) ? Status{} : s; }

}  // namespace moecomm
