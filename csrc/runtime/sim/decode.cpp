#include "runtime/sim/decode.hpp"

#include <algorithm>
#include <cstring>

namespace moecomm {

SimDecode::SimDecode(SimNet& net, const DecodeView& view, int workers)
    : net_(net), view_(view), workers_(workers), table_bytes_(place_decode_turn(view, nullptr, turns_[0])) {
  for (auto& tables : tables_) tables = std::make_unique_for_overwrite<char[]>(table_bytes_);
}

void SimDecode::reset(bool poison) {
  epoch_ = 0;
  for (int i = 0; i < 2; ++i) {
    if (poison) std::memset(tables_[i].get(), SimNet::kPoison, table_bytes_);
    turns_[i] = {};
    place_decode_turn(view_, tables_[i].get(), turns_[i]);
    std::fill_n(turns_[i].sent_flag, view_.geometry.size, 0);
    std::fill_n(turns_[i].answered_flag, view_.geometry.size, 0);
    stages_[i] = Stage::idle;
    y_[i] = nullptr;
    wire_[i] = Wire::plain;
    refused_[i] = Why::none;
  }
}

DecodeTurn& SimDecode::begin(const SimDecodeDispatch& call) {
  DecodeTurn& t = turn(++epoch_);
  t.epoch = epoch_;
  t.bank = t.parity();
  t.tokens = call.tokens;
  t.weighted = call.weights != nullptr;
  t.mode = call.refused == Why::none ? mode_of(call.shape.scales, t.weighted) : kRefusedMode;
  t.call = call.shape;
  return t;
}

}  // namespace moecomm
