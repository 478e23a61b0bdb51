// Decode dispatch, the source's side.
//
//   decode_list          tokens [begin, end): checks the picks; numbers the messages to every owner
//   decode_shift_slots   shifts the slots of a slice, numbered from 0, behind those of the slices before
//   decode_send          reads each row once, stages it with its header, puts it to its owners on other nodes
//   decode_announce      after all slices: the flag, with the number of messages before it
#pragma once
#include "protocol/decode.hpp"
#include "protocol/decode_verify.hpp"
#include "protocol/plan.hpp"
#include "protocol/quantize.hpp"

namespace moecomm {

// Checks the caller's picks of tokens [begin, end) and copies them to the turn.
template <Group G>
MOE_HD Status decode_check_picks(G g, const DecodeSendArgs& a, int begin, int end) {
  const int k_max = a.d.shape.top_k;
  Status bad;
  for (int t = begin + g.lane(); t < end && bad.ok(); t += g.size()) {
    int32_t* ids = a.turn.ids + int64_t{t} * k_max;
    for (int k = 0; k < k_max && bad.ok(); ++k) {
      const int64_t at = int64_t{t} * k_max + k;
      const int64_t id = a.ids64 ? a.ids64[at] : a.ids32[at];
      ids[k] = static_cast<int32_t>(id);
      if (id == -1) continue;
      if (id < 0 || id >= a.d.shape.num_experts) bad = bad_pick(BadInput::id_out_of_range, t, id);
      for (int j = 0; j < k && bad.ok(); ++j)
        if (ids[j] == id) bad = bad_pick(BadInput::id_twice, t, id);
    }
    for (int k = 0; k < k_max && a.d.mask != nullptr && bad.ok(); ++k)
      ids[k] = static_cast<int32_t>(a.d.served(ids[k]));
  }
  return first_failure(g, bad);
}

// Writes nothing that a peer reads: an invalid pick ends the call before anything moves. `sent` [R] out:
// messages per owner.
template <Group G>
MOE_HD Status decode_list(G g, const DecodeSendArgs& a, int begin, int end, int32_t* sent) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int k_max = d.shape.top_k, size = d.geometry.size;
  MOE_TRY(decode_check_picks(g, a, begin, end));

  // Each lane handles its own subset of the owners, so slots follow token order without atomics.
  for (int r = g.lane(); r < size; r += g.size()) sent[r] = 0;
  for (int t = begin; t < end; ++t) {
    const int32_t* ids = turn.ids + int64_t{t} * k_max;
    for (int k = 0; k < k_max; ++k) {
      const int owner = ids[k] < 0 ? -1 : d.owner(ids[k]);
      if ((owner < 0 ? 0 : owner) % g.size() != g.lane()) continue;
      bool first = owner >= 0;
      for (int j = 0; j < k && first; ++j) first = ids[j] < 0 || d.owner(ids[j]) != owner;
      turn.slot[int64_t{t} * k_max + k] = first ? sent[owner]++ : -1;
    }
  }
  g.sync();
  return {};
}

// Slice `part` of `parts`, tokens [begin, end). `sent` [parts, R]: the counts of decode_list for each slice.
template <Group G>
MOE_HD void decode_shift_slots(G g, const DecodeSendArgs& a, int begin, int end, const int32_t* sent,
                               int part, int parts) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int size = d.geometry.size, k_max = d.shape.top_k;
  for (int r = g.lane(); r < size; r += g.size()) {
    const int32_t before = detail::sum_before(sent + r, size, part);
    if (part == parts - 1) turn.sent[r] = before + sent[int64_t{part} * size + r];
    for (int64_t i = int64_t{begin} * k_max; i < int64_t{end} * k_max && before > 0; ++i)
      if (turn.ids[i] >= 0 && d.owner(turn.ids[i]) == r && turn.slot[i] >= 0)
        turn.slot[i] += before;  // only picks of this lane's owners
  }
  g.sync();
}

template <Group G, Fabric<G> F>
MOE_HD void decode_send(G g, F f, const DecodeSendArgs& a, int begin, int end) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int k_max = d.shape.top_k, me = d.geometry.rank, own = d.geometry.local();
  const uint64_t header_bytes = decode_header_bytes(k_max), stride = wire_stride(turn.call);
  Counters& count = f.counters();
  for (int t = begin; t < end; ++t) {
    const int32_t* ids = turn.ids + int64_t{t} * k_max;
    const int32_t* slots = turn.slot + int64_t{t} * k_max;
    DecodeHeader* header = f.window(own, d.message(turn.parity(), t));
    const char* x = a.x + t * (a.quantizes() ? d.shape.combine_row_bytes() : turn.call.row_bytes);
    bool wanted = false;
    for (int k = 0; k < k_max; ++k) wanted |= slots[k] >= 0;
    if (!wanted) continue;
    char* row = header->row(k_max);
    for (int k = g.lane(); k < k_max; k += g.size())
      header->pick()[k] = {ids[k], a.weights ? a.weights[int64_t{t} * k_max + k] : 1.0f};
    if (a.quantizes()) {
      f.quantize_row(g, row, row + align16(turn.call.row_bytes), x, d.shape.hidden, d.shape.dtype,
                     turn.call.scales);
    } else {
      f.copy_row(g, row, x, turn.call.row_bytes);
      if (a.scales)
        f.copy_row(g, row + align16(turn.call.row_bytes), a.scales + t * turn.call.scale_bytes,
                   turn.call.scale_bytes);
    }
    g.sync();
    if (g.lane() != 0) continue;
    header->token = t;
    if (d.check)  // of the caller's rows, if they are sent unchanged
      header->checksum = verify::message_checksum(
          d, turn, header, me, t, a.quantizes() ? row : x,
          a.quantizes() ? row + align16(turn.call.row_bytes) : a.scales + t * turn.call.scale_bytes, 1);
    count.quantized_rows += a.quantizes();
    for (int k = 0; k < k_max; ++k) {
      if (slots[k] < 0) continue;
      const int r = d.owner(ids[k]);
      HopCounters& hop = d.same_node(r) ? count.node : count.rail;
      hop.logical_rows += 1;
      hop.logical_bytes += stride;
      hop.physical_rows += r != me;
      hop.physical_bytes += r != me ? header_bytes + stride : 0;
      if (d.same_node(r))
        f.window(own, d.wanted(turn.parity(), d.local(r)))[slots[k]] = t;
      else
        put_bytes(f, r, d.landed(turn.parity(), me, r, slots[k]), header, header_bytes + stride);
    }
  }
  g.sync();
}

// Sends the flag to every parts-th rank that is not masked. A rank that refuses its part sends the refusal as
// its flag, so that its epochs stay in step.
template <Group G, Fabric<G> F>
MOE_HD void decode_announce(G g, F f, const DecodeSendArgs& a, Why refused, int part = 0, int parts = 1) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const int me = d.geometry.rank, size = d.geometry.size, parity = turn.parity();
  g.sync();
  if (g.lane() == 0)
    for (int step = part; step < size; step += parts) {
      const int r = (me + 1 + step) % size;  // this rank last; no two ranks start with the same one
      if (d.masked(r)) continue;
      const uint64_t flag = refused == Why::none
                                ? make_flag(turn.epoch, turn.mode, turn.sent[r])
                                : make_flag(turn.epoch, kRefusedMode, static_cast<int64_t>(refused));
      const uint64_t add = flag - turn.sent_flag[r];
      turn.sent_flag[r] = flag;
      if (d.same_node(r))
        f.signal_node(d.local(r), d.sent_flag(parity, d.geometry.local()), add);
      else
        f.signal_rail(r, d.remote_sent_flag(parity, me), add);
    }
  g.sync();
}

}  // namespace moecomm
