#include "runtime/sim_decode.hpp"

namespace moecomm {

SimDecode::SimDecode(SimNet& net, const DecodeView& view, int workers) : net_(net), view_(view), workers_(workers) {
  const uint64_t picks = uint64_t(view.shape.max_tokens) * view.shape.top_k, size = view.geometry.size;
  for (int i = 0; i < 2; ++i) {
    detail::Cursor c;
    const uint64_t ids = c.take(4 * picks), slot = c.take(4 * picks), weights = c.take(4 * picks);
    const uint64_t sent = c.take(4 * size), got = c.take(4 * size), sent_flag = c.take(8 * size), answered_flag = c.take(8 * size);
    tables_[i].reset(new char[c.at]());
    char* m = tables_[i].get();
    DecodeTurn& t = turns_[i];
    t.ids = reinterpret_cast<int32_t*>(m + ids);
    t.slot = reinterpret_cast<int32_t*>(m + slot);
    t.weights = reinterpret_cast<float*>(m + weights);
    t.sent = reinterpret_cast<int32_t*>(m + sent);
    t.got = reinterpret_cast<int32_t*>(m + got);
    t.sent_flag = reinterpret_cast<uint64_t*>(m + sent_flag);
    t.answered_flag = reinterpret_cast<uint64_t*>(m + answered_flag);
  }
}

DecodeTurn& SimDecode::begin(const SimDecodeDispatch& call) {
  DecodeTurn& t = turn(++epoch_);
  t.epoch = epoch_;
  t.tokens = call.tokens;
  t.weighted = call.weights != nullptr;
  t.mode = mode_of(call.shape.scales, t.weighted);
  t.call = call.shape;
  return t;
}

}  // namespace moecomm
