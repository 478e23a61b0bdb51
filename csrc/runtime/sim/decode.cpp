#include "runtime/sim/decode.hpp"

#include <algorithm>
#include <cstring>

namespace moecomm {

SimDecode::SimDecode(SimNet& net, const DecodeView& view, int workers)
    : net_(net), view_(view), workers_(workers), table_bytes_(place_decode_turn(view, nullptr, turns_[0])) {
  for (auto& tables : tables_) tables = std::make_unique_for_overwrite<char[]>(table_bytes_);
}

void SimDecode::reset(bool poison) {
  order_ = {};
  view_.mask = nullptr;
  for (int i = 0; i < 2; ++i) {
    if (poison) std::memset(tables_[i].get(), SimNet::kPoison, table_bytes_);
    turns_[i] = {};
    place_decode_turn(view_, tables_[i].get(), turns_[i]);
    std::fill_n(turns_[i].sent_flag, view_.geometry.size, 0);
    std::fill_n(turns_[i].answered_flag, view_.geometry.size, 0);
    std::fill_n(turns_[i].released_flag, view_.geometry.size, 0);
    answers_[i] = {};
  }
}

}  // namespace moecomm
