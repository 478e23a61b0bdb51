// SimDecode: the decode state of one simulated rank. It uses session/turns.hpp, so a program may leave out a
// receive phase or a combine.
#pragma once
#include <memory>
#include <vector>

#include "runtime/sim/decode_run.hpp"
#include "runtime/sim/rules.hpp"
#include "session/decode_arguments.hpp"
#include "session/turns.hpp"

namespace moecomm {

class SimDecode {
 public:
  static constexpr int kSpace = 1;  // index of its memory among the net's spaces

  SimDecode(SimNet& net, const DecodeView& view, int workers);

  // Restores the initial state. The tables are large and mostly untouched, so without `poison` only the flags
  // are cleared.
  void reset(bool poison);

  template <Fabric<Lane> F>
  Status dispatch(F f, const DecodeDispatchCall& call) {
    MOE_TRY(order_.before_dispatch([&](uint64_t e) { return in_step(receive(f, e)); },
                                   [&](uint64_t e) { return in_step(sum(f, e)); }, rules_of(f)));
    order_.open();
    DecodeTurn& t = turn(order_.next());
    open_turn(t, view_, order_.next(), call, rules_of(f));
    const DecodeSendArgs a = make_decode_send_args(view(rules_of(f), Rule::mask_picks), t, call);
    MOE_TRY(sim_decode_send(net_, f, a, workers_));
    order_.sent();
    return {};
  }

  // Returns at once if it has been received already.
  template <Fabric<Lane> F>
  Status receive(F f, uint64_t epoch) {
    if (stage(epoch) != DecodeStage::sent) return {};
    const Status s = sim_decode_receive(
        net_, f, make_decode_receive_args(view(rules_of(f), Rule::skip_masked), turn(epoch)), workers_);
    order_.received(epoch, s.ok(), turn(epoch).refused());
    return s;
  }

  // Before the experts' rows of a combine are written.
  template <Fabric<Lane> F>
  Status begin_combine(F f, uint64_t epoch) {
    DecodeTurn& t = turn(epoch);
    t.combine = order_.combines(epoch);
    if (t.combine == 0 || !rules_of(f).keeps(Rule::await_release)) return {};
    return sim_part(net_, "decode release", [&] { return run_decode_release(Lane{}, f, view_, t); });
  }

  // The experts' rows must be in place.
  template <Fabric<Lane> F>
  Status combine(F f, const DecodeCombineCall& call) {
    const uint64_t epoch = call.epoch;
    DecodeTurn& t = turn(epoch);
    DecodeAnswer& answer = answers_[epoch & 1] = make_decode_answer(t, call, rules_of(f));
    const int64_t picks = int64_t{t.tokens} * view_.shape.top_k;
    for (int64_t i = 0; i < picks; ++i) t.weights[i] = call.weights ? call.weights[i] : 1.0f;
    MOE_TRY(
        sim_decode_combine_send(net_, f, make_decode_combine_args(view_, t, answer, call.rows), workers_));
    order_.answered(epoch, call.refused != Why::none);
    return {};
  }

  template <Fabric<Lane> F>
  Status sum(F f, uint64_t epoch) {
    if (stage(epoch) != DecodeStage::answered) return {};
    const DecodeCombineArgs a = make_decode_combine_args(view_, turn(epoch), answers_[epoch & 1], nullptr);
    const Status s = sim_decode_combine_receive(net_, f, a, workers_);
    net_.flush();
    order_.summed(epoch, s.ok());
    return s;
  }

  // No step of this rank may be running. latest: the highest epoch of all remaining ranks.
  template <Fabric<Lane> F>
  void mask(F f, const std::vector<uint8_t>& masked, uint64_t latest) {
    masked_ = masked;
    view_.mask = masked_.data();
    order_.drop();
    if (rules_of(f).keeps(Rule::move_epoch)) order_.skip_to(latest);
  }

  uint64_t epoch() const { return order_.latest(); }
  DecodeStage stage(uint64_t epoch) const { return order_.stage(epoch); }
  DecodeTurn& turn(uint64_t epoch) { return turns_[epoch & 1]; }
  const DecodeView& view() const { return view_; }
  char* memory() const { return net_.window(kSpace, view_.geometry.rank); }

 private:
  // The view, without the mask if a mutant leaves out the rule.
  template <SessionRules R>
  DecodeView view(R rules, Rule rule) const {
    DecodeView d = view_;
    if (!rules.keeps(rule)) d.mask = nullptr;
    return d;
  }

  SimNet& net_;
  DecodeView view_;
  std::vector<uint8_t> masked_;
  int workers_;
  DecodeTurns order_;
  DecodeTurn turns_[2];
  std::unique_ptr<char[]> tables_[2];
  uint64_t table_bytes_;
  DecodeAnswer answers_[2] = {};
};

}  // namespace moecomm
