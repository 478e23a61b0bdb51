// The part of the arena that a dispatch takes, and how it is divided.
#pragma once
#include "protocol/views.hpp"
#include "session/rules.hpp"

namespace moecomm {

struct Piece {
  uint64_t offset;     // in the window
  uint64_t block;      // bytes of the block that the dispatch delivers
  uint64_t bytes;      // of the block and of the room for the experts' output behind it
  uint64_t available;  // bytes of the offered piece

  constexpr uint64_t output() const { return offset + block; }
  constexpr bool fits() const { return bytes <= available; }
};

// Rows of the dispatch's result at this rank. Requires the counts of all ranks.
constexpr int64_t local_rows(const BufferView& b, const PlanView& plan) {
  return plan.call.capacity >= 0 ? plan.call.capacity : plan.rank_rows[b.geometry.local()];
}

// Every gateway of the node decides the same (protocol/exchange.hpp). If the piece does not fit, all ranks
// have refused the call.
template <SessionRules R = EveryRule>
constexpr Piece piece_of(const BufferView& b, const CallShape& call, uint64_t rows, const Offer& offer,
                         R rules = {}) {
  const uint64_t block = block_layout(rows, call, b.shape.top_k).bytes,
                 bytes = block + output_layout(rows, b.shape).bytes;
  const int chosen = offer.piece_for(bytes);
  return {offer.offset[chosen], block, rules.keeps(Rule::hold_output) ? bytes : block, offer.bytes[chosen]};
}

}  // namespace moecomm
