// Decode dispatch, the owner's side. Sources are processed in ascending order, and the messages of a source
// in the order of their slots.
//
//   decode_accept         waits for the source's flag
//   decode_number         messages [begin, end): writes a note about each; gives each row the next place of
//                         its expert
//   decode_shift_places   shifts the places of a slice, numbered from 0, behind those of the slices before
//   decode_pack           copies the rows to their places; with checks, it ends at the first corrupt row
#pragma once
#include "protocol/decode.hpp"
#include "protocol/decode_verify.hpp"
#include "protocol/quantize.hpp"

namespace moecomm {

// `got` out: the number of messages of the source, 0 if it is masked. The group with part 0 keeps it for the
// answers.
template <Group G, Fabric<G> F>
MOE_HD Status decode_accept(G g, F f, const DecodeReceiveArgs& a, int source, int& got, int part = 0) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int parity = turn.parity(), own = d.geometry.local();
  const uint64_t at_least = make_flag(turn.epoch, 0, 0);
  int count = 0;
  const Status s = leader(g, [&] {
    const CounterAt at =
        d.same_node(source) ? d.sent_flag(parity, d.local(source)) : d.remote_sent_flag(parity, source);
    if (d.masked(source)) {
      if (part == 0) turn.got[source] = 0;
      return Status{};
    }
    MOE_TRY(d.same_node(source) ? f.wait_node(at, at_least, Phase::arrive, source)
                                : f.wait_rail(at, at_least, Phase::arrive, source));
    // The flag does not change now: the source writes its next value two epochs later, after this rank's
    // receipt.
    const uint64_t flag = *(d.same_node(source) ? f.window(own, at) : f.rail(at));
    count = turn.refused() || flag_mode(flag) == kRefusedMode ? 0 : flag_count(flag);
    if (part == 0) turn.got[source] = count;
    return flag_mode(flag) == turn.mode || turn.refused()
               ? Status{}
               : detail::other_mode(flag_mode(flag), flag_count(flag), turn.mode, Phase::arrive, source);
  });
  got = g.broadcast(count, 0);
  return s;
}

// `counts` [local experts], in and out: rows before these messages; then including their rows.
template <Group G, Fabric<G> F, class Count>
MOE_HD void decode_number(G g, F f, const DecodeReceiveArgs& a, int source, int begin, int end,
                          Count* counts) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int k_max = d.shape.top_k, per_rank = d.experts_per_rank();
  const int32_t per_expert = static_cast<int32_t>(decode_rows_per_expert(d.geometry, d.shape));
  const int32_t bank = static_cast<int32_t>(turn.bank * d.packed_rows());
  const int32_t* wanted =
      d.same_node(source) ? f.window(d.local(source), d.wanted(turn.parity(), d.geometry.local())) : nullptr;
  // Headers may be in a peer's memory, so the lanes load them in parallel.
  for (int i = begin + g.lane(); i < end; i += g.size()) {
    int32_t* note = detail::arrived(d, turn, source, i);
    const DecodeHeader* header = detail::decode_message(f, d, turn, source, i, wanted ? wanted[i] : 0);
    note[0] = d.check ? verify::token_in_range(d, header->token) : header->token;
    for (int k = 0; k < k_max; ++k) {
      const int e = header->pick()[k].expert - d.first_expert();
      note[1 + k] = e < 0 || e >= per_rank ? -1 : e;
    }
  }
  g.sync();
  // Each lane handles its own subset of the experts, so rows follow (source rank, source token) without
  // atomics.
  for (int i = begin; i < end; ++i) {
    int32_t* note = detail::arrived(d, turn, source, i);
    int32_t* places = detail::decode_places(f, d, turn, source, note);
    for (int k = 0; k < k_max; ++k) {
      const int e = note[1 + k];
      if (e >= 0 && e % g.size() == g.lane())
        places[k] = bank + e * per_expert + static_cast<int32_t>(counts[e]++);
    }
  }
  g.sync();
}

// Slice `part` of `parts`, messages [begin, end) of `source`. `counts` [parts, local experts]: the counts of
// each slice.
template <Group G, Fabric<G> F>
MOE_HD void decode_shift_places(G g, F f, const DecodeReceiveArgs& a, int source, int begin, int end,
                                const int32_t* counts, int part, int parts) {
  const DecodeView& d = a.d;
  const int k_max = d.shape.top_k, per_rank = d.experts_per_rank();
  int64_t* totals = f.window(d.geometry.local(), d.counts(a.turn.bank));
  for (int e = g.lane(); e < per_rank; e += g.size()) {
    const int32_t before = detail::sum_before(counts + e, per_rank, part);
    if (part == parts - 1) totals[e] = before + counts[int64_t{part} * per_rank + e];
    for (int i = begin; i < end && before > 0; ++i) {
      int32_t* note = detail::arrived(d, a.turn, source, i);
      for (int k = 0; k < k_max; ++k)
        if (note[1 + k] == e) detail::decode_places(f, d, a.turn, source, note)[k] += before;
    }
  }
  g.sync();
}

template <Group G, Fabric<G> F>
MOE_HD Status decode_pack(G g, F f, const DecodeReceiveArgs& a, int source, int begin, int end) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const CallShape& call = turn.call;
  const int own = d.geometry.local(), k_max = d.shape.top_k;
  char* x = f.window(own, d.x(turn.bank));
  const int64_t per_expert = static_cast<int64_t>(decode_rows_per_expert(d.geometry, d.shape)),
                bank = static_cast<int64_t>(turn.bank * d.packed_rows());
  uint64_t replicated = 0;
  for (int i = begin; i < end; ++i) {
    int32_t* note = detail::arrived(d, turn, source, i);
    const int32_t* places = detail::decode_places(f, d, turn, source, note);
    const DecodeHeader* message = detail::decode_message(f, d, turn, source, i, note[0]);
    const char* row = message->row(k_max);
    char** targets = f.targets();
    int copies = 0;
    for (int k = 0; k < k_max; ++k) {
      const int e = note[1 + k];
      if (e < 0) continue;
      const int64_t place = places[k] - bank;
      if (copies % g.size() == g.lane()) targets[copies] = x + place * call.row_bytes;
      detail::put_scales(g, f, call, f.window(own, d.scales(turn.bank, e)), per_expert, place % per_expert,
                         row + align16(call.row_bytes));
      ++copies;
    }
    g.sync();
    f.spread_row(g, targets, copies, row, call.row_bytes);  // reads the row once, maybe over a link
    g.sync();                                               // then the targets may be overwritten
    replicated += copies - 1;
    if (!d.check) continue;
    f.finish_rows(g);
    MOE_TRY(leader(g, [&] { return verify::packed_rows(f, a, source, message, note, places); }));
  }
  if (g.lane() == 0) f.counters().replicated_rows += replicated;
  g.sync();
  return {};
}

}  // namespace moecomm
