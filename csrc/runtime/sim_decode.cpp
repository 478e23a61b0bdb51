#include "runtime/sim_decode.hpp"

namespace moecomm {

SimDecode::SimDecode(SimNet& net, const DecodeView& view, int workers) : net_(net), view_(view), workers_(workers) {
  for (int i = 0; i < 2; ++i) {
    tables_[i].reset(new char[place_decode_turn(view, nullptr, turns_[i])]());
    place_decode_turn(view, tables_[i].get(), turns_[i]);
  }
}

DecodeTurn& SimDecode::begin(const SimDecodeDispatch& call) {
  DecodeTurn& t = turn(++epoch_);
  t.epoch = epoch_;
  t.bank = t.parity();
  t.tokens = call.tokens;
  t.weighted = call.weights != nullptr;
  t.mode = mode_of(call.shape.scales, t.weighted);
  t.call = call.shape;
  return t;
}

}  // namespace moecomm
