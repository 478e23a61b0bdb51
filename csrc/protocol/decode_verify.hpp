// MOECOMM_CHECK=1 in decode: the additional checks of its roles.
//
//   dispatch  The header of a message has a checksum of its picks and of the row with its scales. The owner
//             verifies each packed copy of the row against it.
//   combine   The owner writes a checksum of every answer: of a row that is read in place, of a sum, and of a
//             row that crosses the rail. The source verifies it before it adds the row.
//
// As in verify.hpp, a seed ties each checksum to one epoch, rank and token, so that data left over from an
// earlier epoch is detected like damaged data.
#pragma once
#include "protocol/decode.hpp"
#include "protocol/verify.hpp"

namespace moecomm::verify {

// The checksum of a message of `source`: its picks, and the row and scales at the given addresses. step:
// words from one scale to the next.
MOE_HD inline uint64_t message_checksum(const DecodeView& d, const DecodeTurn& turn,
                                        const DecodeHeader* header, int source, int token, const char* row,
                                        const char* scales, int64_t step) {
  const uint64_t seed = row_checksum(header->pick(), sizeof(DecodePick) * d.shape.top_k,
                                     checksum_seed(turn.epoch, source, token));
  return wire_checksum(turn.call, row, scales, step, seed);
}

// A damaged header must not cause an access out of range before the checksum is verified.
MOE_HD inline int32_t token_in_range(const DecodeView& d, int32_t token) {
  return token >= 0 && token < d.shape.max_tokens ? token : 0;
}

// Verifies the packed copies of a message's row. A message without a pick for this rank is corrupt as well.
template <LaneFabric F>
MOE_HD Status packed_rows(F f, const DecodeReceiveArgs& a, int source, const DecodeHeader* header,
                          const int32_t* note, const int32_t* places) {
  const DecodeView& d = a.d;
  const DecodeTurn& turn = a.turn;
  const CallShape& call = turn.call;
  const int own = d.geometry.local();
  const int64_t per_expert = static_cast<int64_t>(decode_rows_per_expert(d.geometry, d.shape)),
                bank = static_cast<int64_t>(turn.bank * d.packed_rows());
  bool found = false;
  for (int k = 0; k < d.shape.top_k; ++k) {
    if (note[1 + k] < 0) continue;
    found = true;
    const int64_t place = places[k] - bank, row = place % per_expert;
    const char* scales = f.window(own, d.scales(turn.bank, note[1 + k])) +
                         row * (call.scales_by_column ? 4 : call.scale_bytes);
    const uint64_t got = message_checksum(d, turn, header, source, note[0],
                                          f.window(own, d.x(turn.bank)) + place * call.row_bytes, scales,
                                          call.scales_by_column ? scale_column(per_expert) : 1);
    if (got != header->checksum) return wrong_row(Phase::arrive, source, note[0], header->checksum, got);
  }
  return found ? Status{} : wrong_row(Phase::arrive, source, note[0], header->checksum, 0);
}

MOE_HD inline uint64_t answer_checksum(const DecodeTurn& turn, const char* answer, uint64_t bytes, int owner,
                                       int64_t pick) {
  const uint64_t call = turn.epoch | static_cast<uint64_t>(turn.combine) << 40;
  return row_checksum(answer, bytes, checksum_seed(call, owner, pick));
}

// One lane of the source verifies the answer to pick k of token t, which is at `answer`.
template <LaneFabric F>
MOE_HD Status answered_row(F f, const DecodeCombineArgs& a, int t, int k, int owner, const char* answer) {
  const DecodeView& d = a.d;
  const int parity = a.turn.parity();
  const int64_t pick = int64_t{t} * d.shape.top_k + k;
  const bool same_node = d.same_node(owner);
  const uint64_t* signs = same_node ? f.window(d.local(owner), d.signs(parity, d.geometry.rank))
                                    : f.rail(d.landed_signs(parity, owner));
  const uint64_t want = signs[pick];
  const uint64_t got =
      answer_checksum(a.turn, answer, d.shape.wire_bytes(same_node ? Wire::plain : a.wire), owner, pick);
  return got == want ? Status{} : wrong_row(Phase::sum, owner, t, want, got);
}

}  // namespace moecomm::verify
