// SimDecode: one simulated rank's decode state. Keeps the rules (A) and (B) of protocol/decode.hpp, as the
// cpu world's Decode does, so a program may leave out a receive phase or a combine.
#pragma once
#include <memory>
#include <vector>

#include "runtime/sim/decode_run.hpp"

namespace moecomm {

struct SimDecodeDispatch {
  int32_t tokens = 0;
  const int64_t* ids = nullptr;
  const float* weights = nullptr;  // they travel, where given
  const char* x = nullptr;
  const char* scales = nullptr;
  CallShape shape;
  Why refused = Why::none;
};

class SimDecode {
 public:
  enum class Stage { idle, sent, received, answered, done };
  static constexpr int kSpace = 1;  // its memories among the net's spaces

  SimDecode(SimNet& net, const DecodeView& view, int workers);

  // As new. The tables are large and mostly untouched: without `poison` only what counts from 0 is cleared.
  void reset(bool poison);

  template <class F>
  Status dispatch(F f, const SimDecodeDispatch& call) {
    MOE_TRY(in_step(receive(f, epoch_)));                  // rule A
    if (epoch_ > 0) MOE_TRY(in_step(sum(f, epoch_ - 1)));  // rule B
    DecodeTurn& t = begin(call);
    DecodeSendArgs a;
    a.d = view_;
    a.turn = t;
    a.ids64 = call.ids;
    a.x = call.x;
    a.scales = call.scales;
    a.weights = call.weights;
    a.refused = call.refused;
    MOE_TRY(sim_decode_send(net_, f, a, workers_));
    stages_[t.parity()] = Stage::sent;
    return {};
  }

  // At once where it has been received already.
  template <class F>
  Status receive(F f, uint64_t epoch) {
    if (stage(epoch) != Stage::sent) return {};
    const Status s = sim_decode_receive(net_, f, DecodeReceiveArgs{view_, turn(epoch)}, workers_);
    stages_[epoch & 1] = !s.ok() ? Stage::idle : turn(epoch).refused() ? Stage::done : Stage::received;
    return s;
  }

  // The experts' rows are in place.
  template <class F>
  Status combine(F f, uint64_t epoch, const float* weights, Wire wire, char* y, Why refused) {
    DecodeTurn& t = turn(epoch);
    refused_[epoch & 1] = refused;
    const int64_t picks = int64_t{t.tokens} * view_.shape.top_k;
    for (int64_t i = 0; i < picks; ++i) t.weights[i] = weights ? weights[i] : 1.0f;
    y_[epoch & 1] = y;
    wire_[epoch & 1] = wire;
    MOE_TRY(sim_decode_combine_send(net_, f,
                                    DecodeCombineArgs{view_, t, mode_of(wire, t.weighted), wire,
                                                      memory() + view_.rows(t.parity()), nullptr, refused},
                                    workers_));
    stages_[epoch & 1] = Stage::answered;
    return {};
  }

  template <class F>
  Status sum(F f, uint64_t epoch) {
    if (stage(epoch) != Stage::answered) return {};
    const DecodeTurn& t = turn(epoch);
    const Wire wire = wire_[epoch & 1];
    const Status s =
        sim_decode_combine_receive(net_, f,
                                   DecodeCombineArgs{view_, t, mode_of(wire, t.weighted), wire, nullptr,
                                                     y_[epoch & 1], refused_[epoch & 1]},
                                   workers_);
    net_.flush();
    stages_[epoch & 1] = Stage::done;
    return s;
  }

  uint64_t epoch() const { return epoch_; }
  Stage stage(uint64_t epoch) const {
    return turns_[epoch & 1].epoch == epoch ? stages_[epoch & 1] : Stage::idle;
  }
  DecodeTurn& turn(uint64_t epoch) { return turns_[epoch & 1]; }
  const DecodeView& view() const { return view_; }
  char* memory() const { return net_.window(kSpace, view_.geometry.rank); }

 private:
  // As in the cpu world's Decode: how rows are coded, and whether weights travel.
  template <class Code>
  static int mode_of(Code code, bool weighted) {
    return static_cast<int>(code) | (weighted ? 4 : 0);
  }
  static Status in_step(const Status& s) { return keeps_step(s) ? Status{} : s; }  // as there, too
  DecodeTurn& begin(const SimDecodeDispatch& call);

  SimNet& net_;
  DecodeView view_;
  int workers_;
  uint64_t epoch_ = 0;
  DecodeTurn turns_[2];
  Stage stages_[2] = {};
  std::unique_ptr<char[]> tables_[2];
  uint64_t table_bytes_;
  char* y_[2] = {};
  Wire wire_[2] = {};
  Why refused_[2] = {};  // combines, by this rank
};

}  // namespace moecomm
