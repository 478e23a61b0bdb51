// Builds the arguments of decode's phases. One function per structure, for every world and for the tests.
#pragma once
#include "protocol/decode.hpp"
#include "session/calls.hpp"
#include "session/mode.hpp"
#include "session/rules.hpp"

namespace moecomm {

// Sets the fields of an epoch's turn that the call decides. The turn's tables are not changed.
template <SessionRules R = EveryRule>
constexpr void open_turn(DecodeTurn& t, const DecodeView& d, uint64_t epoch, const DecodeDispatchCall& call,
                         R rules = {}) {
  const bool refused = call.refused != Why::none, coded = call.quant != ScaleKind::none;
  t.epoch = epoch;
  t.bank = t.parity();
  t.tokens = refused ? 0 : call.tokens;
  t.combine = 0;
  t.weighted = call.weighted;
  t.mode = refused ? kRefusedMode : decode_mode(call.quant, call.weighted, rules);
  t.call = CallShape{.row_bytes = coded ? static_cast<uint64_t>(d.shape.hidden) : d.shape.combine_row_bytes(),
                     .scale_bytes = 4 * static_cast<uint64_t>(scale_words(d.shape.hidden, call.quant)),
                     .scales = call.quant,
                     .scales_by_column = call.scales_by_column};
}

// Call open_turn() first.
constexpr DecodeSendArgs make_decode_send_args(const DecodeView& d, const DecodeTurn& turn,
                                               const Tokens& call) {
  return {d, turn, call.ids64, call.ids32, call.x, call.scales, call.weights, call.refused};
}

constexpr DecodeReceiveArgs make_decode_receive_args(const DecodeView& d, const DecodeTurn& turn) {
  return {d, turn};
}

// What the second phase of a combine needs from the first.
struct DecodeAnswer {
  int32_t mode;
  Wire wire;
  char* y;
  Why refused;
};

template <SessionRules R = EveryRule>
constexpr DecodeAnswer make_decode_answer(const DecodeTurn& turn, const DecodeCombineCall& call,
                                          R rules = {}) {
  return {decode_mode(call.wire, turn.weighted, rules), call.wire, call.y, call.refused};
}

// rows: the experts' rows. They are in this rank's window if peers read them there.
constexpr DecodeCombineArgs make_decode_combine_args(const DecodeView& d, const DecodeTurn& turn,
                                                     const DecodeAnswer& answer, const char* rows) {
  return {d, turn, answer.mode, answer.wire, rows, answer.y, answer.refused};
}

}  // namespace moecomm
