// Words of the protocol as types: Geometry, DType, Status. Trivially copyable, host and device.
#pragma once
#include <cstdint>

#include "base/portability.hpp"

namespace moecomm {

// Where a rank sits. Nodes are consecutive blocks of ranks_per_node ranks; a rail joins the ranks of
// the same local index across nodes.
struct Geometry {
  int rank = 0;
  int size = 1;
  int ranks_per_node = 1;

  MOE_HD constexpr int nodes() const { return size / ranks_per_node; }
  MOE_HD constexpr int node() const { return rank / ranks_per_node; }
  MOE_HD constexpr int local() const { return rank % ranks_per_node; }
  MOE_HD constexpr int rank_at(int node, int local) const { return node * ranks_per_node + local; }
  MOE_HD constexpr int rail_rank(int node) const { return rank_at(node, local()); }
};

enum class DType : int32_t { bf16 = 0, f16 = 1, f32 = 2, f64 = 3 };

MOE_HD constexpr int element_bytes(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

enum class RowLayout : int32_t { expert = 0, rank = 1 };

enum class Code : int32_t {
  ok = 0,
  invalid = 1,      // an argument is wrong; nothing moved
  timeout = 2,      // a peer did not do its part before the deadline
  lost = 3,         // a peer's process or link is gone
  capacity = 4,     // rows do not fit the arena or the stated capacity
  mismatch = 5,     // ranks disagree on an argument of this call
  corrupt = 6,      // MOECOMM_CHECK=1 found a row that is not what its source sent
  interrupted = 7,  // this rank's user wanted an end while it waited
  refused = 8,  // a rank refuses its part in this call: all ranks learn of it here, and are in step for the
                // next one
  out_of_step = 9,  // ranks make different calls: what one sends is not what the other waits for
};

// Why a rank refuses its part in a call, as far as it travels: the detail of a `refused` status.
enum class Why : int32_t { none = 0, arguments = 1, picks = 2, error = 3 };

enum class Phase : int32_t {
  none,
  announce,
  counts,
  send,
  forward,
  arrive,
  publish,
  reduce,
  sum,
  done,
  flush
};

// What a role returns. `peer` is the global rank that is suspected, -1 where there is none; expected/got are
// counter values of the wait that failed (or sizes, or checksums); `detail` says more about some codes (a
// corrupt row's token). `reporter` is the rank that told this one, -1 where it found out itself.
struct Status {
  Code code = Code::ok;
  Phase phase = Phase::none;
  int32_t peer = -1;
  int32_t detail = 0;
  uint64_t expected = 0;
  uint64_t got = 0;
  int32_t reporter = -1;

  MOE_HD constexpr bool ok() const { return code == Code::ok; }
};

// Whether a failure ends the communicator: half a collective cannot be undone. What the call itself brings to
// every rank (a mismatch, a refusal, too little room) does not.
MOE_HD constexpr bool is_final(const Status& s) {
  return s.code == Code::timeout || s.code == Code::lost || s.code == Code::corrupt ||
         s.code == Code::out_of_step;
}

// Details of an `invalid` status: what is wrong with ids (`expected` is the token, `got` the id), or with a
// decode call's turn.
enum BadInput : int32_t {
  kIdOutOfRange = 1,
  kIdTwice = 2,
  kOtherIds = 3,   // than those of the dispatch
  kOutOfTurn = 4,  // `expected` is the stage that the call needs, `got` the one that is
};

// Whether the call still went on to its end, so that the ranks are in step for the next one.
MOE_HD constexpr bool keeps_step(const Status& s) {
  return s.code == Code::capacity || s.code == Code::mismatch || s.code == Code::refused ||
         (s.code == Code::invalid && s.detail != kOutOfTurn);
}

#define MOE_TRY(expr)                            \
  do {                                           \
    const ::moecomm::Status moe_status = (expr); \
    if (!moe_status.ok()) return moe_status;     \
  } while (0)

// Every row and every table on the wire starts on 16 bytes: one vector access, one TMA unit.
MOE_HD constexpr uint64_t align16(uint64_t n) { return (n + 15) & ~uint64_t{15}; }
MOE_HD constexpr uint64_t align_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

}  // namespace moecomm
