// Decode dispatch, the owner's side. Called for the sources in ascending order.
//
//   decode_accept  waits for the source's flag; gives each of its rows the next place of its expert
//   decode_pack    copies its rows there; sources that were accepted may be packed side by side
#pragma once
#include "base/checksum.hpp"
#include "protocol/decode.hpp"
#include "protocol/quantize.hpp"

namespace moecomm {

template <Group G, class F>
MOE_HD Status decode_accept(G g, F f, const DecodeReceiveArgs& a, int source) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), own = d.geometry.local(), k_max = d.shape.top_k, per_rank = d.experts_per_rank();
  const uint64_t at_least = make_flag(turn.epoch, 0, 0);
  MOE_TRY(leader(g, [&] {
    const uint64_t at = d.near(source) ? d.sent_flag(parity, d.local(source)) : d.remote_sent_flag(parity, source);
    MOE_TRY(d.near(source) ? f.wait_node(at, at_least, Phase::arrive, source) : f.wait_rail(at, at_least, Phase::arrive, source));
    // Its next value comes two epochs later, which this rank's receipt precedes: the word is at rest.
    const uint64_t flag = *reinterpret_cast<const uint64_t*>(d.near(source) ? f.window(own, at) : f.rail(at));
    turn.got[source] = flag_count(flag);
    if (flag_mode(flag) != turn.mode)
      return Status{Code::mismatch, Phase::arrive, source, 0, static_cast<uint64_t>(turn.mode), static_cast<uint64_t>(flag_mode(flag))};
    return Status{};
  }));

  int64_t* counts = reinterpret_cast<int64_t*>(f.window(own, d.counts(parity)));
  int32_t* places = reinterpret_cast<int32_t*>(f.window(own, d.places(parity, source)));
  const int32_t per_expert = static_cast<int32_t>(decode_rows_per_expert(d.geometry, d.shape));
  // Lane owns experts: their rows follow (source rank, source token) without atomics.
  for (int e = g.lane(); source == 0 && e < per_rank; e += g.size()) counts[e] = 0;
  for (int i = 0; i < turn.got[source]; ++i) {
    const DecodeHeader* header = reinterpret_cast<const DecodeHeader*>(detail::decode_message(f, d, turn, source, i));
    for (int k = 0; k < k_max; ++k) {
      const int e = header->pick()[k].expert - d.first_expert();
      if (e < 0 || e >= per_rank || e % g.size() != g.lane()) continue;   // another rank's, or another lane's
      places[int64_t{header->token} * k_max + k] = static_cast<int32_t>(e * per_expert + counts[e]++);
    }
  }
  g.sync();
  return {};
}

template <Group G, class F>
MOE_HD Status decode_pack(G g, F f, const DecodeReceiveArgs& a, int source) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const CallShape& call = turn.call;
  const int parity = turn.parity(), own = d.geometry.local(), k_max = d.shape.top_k, per_rank = d.experts_per_rank();
  const uint64_t header_bytes = decode_header_bytes(k_max);
  const int32_t* places = reinterpret_cast<const int32_t*>(f.window(own, d.places(parity, source)));
  char* x = f.window(own, d.x(parity));
  const int64_t per_expert = static_cast<int64_t>(decode_rows_per_expert(d.geometry, d.shape));
  uint64_t replicated = 0;
  for (int i = 0; i < turn.got[source]; ++i) {
    const char* message = detail::decode_message(f, d, turn, source, i);
    const DecodeHeader* header = reinterpret_cast<const DecodeHeader*>(message);
    const char* row = message + header_bytes;
    if (d.check) {
      const uint64_t got = row_checksum(row, call.row_bytes, header->token);
      if (got != header->checksum) return {Code::corrupt, Phase::arrive, source, header->token, header->checksum, got};
    }
    int copies = 0;
    for (int k = 0; k < k_max; ++k) {
      const int e = header->pick()[k].expert - d.first_expert();
      if (e < 0 || e >= per_rank) continue;
      const int64_t place = places[int64_t{header->token} * k_max + k];
      f.copy_row(g, x + place * call.row_bytes, row, call.row_bytes);
      detail::put_scales(g, f, call, f.window(own, d.scales(parity, e)), per_expert, place % per_expert, row + align16(call.row_bytes));
      ++copies;
    }
    replicated += copies - 1;
  }
  if (g.lane() == 0) f.counters().replicated_rows += replicated;
  g.sync();
  return {};
}

}  // namespace moecomm
