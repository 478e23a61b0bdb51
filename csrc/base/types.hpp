// The basic types of the protocol: Geometry, DType, Status. Trivially copyable, for host and device.
#pragma once
#include <cstdint>
#include <type_traits>

#include "base/portability.hpp"

namespace moecomm {

// The number of an enumerator, for a field that can hold enumerators of several types.
template <class Enum>
  requires std::is_enum_v<Enum>
MOE_HD constexpr int32_t number(Enum e) {
  return static_cast<int32_t>(e);
}

// A rank's position. Nodes are consecutive blocks of ranks_per_node ranks. A rail connects the ranks with the
// same local rank in all nodes.
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
  interrupted = 7,  // the user interrupted this rank while it waited
  refused = 8,      // a rank refuses its part in this call; all ranks get this status and stay in step
  out_of_step = 9,  // ranks make different calls: one sends something other than its peer waits for
};

// The reason why a rank refuses its part in a call, as it is sent to peers: the detail of a `refused` status.
// `grow`: its part does not fit the memory; all ranks allocate larger memory and repeat the call.
enum class Why : int32_t { none = 0, arguments = 1, picks = 2, error = 3, grow = 4 };

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

// The result of a role. `peer` is the suspected rank, or -1. `expected` and `got` are counter values of the
// wait that failed (or sizes, or checksums). `detail` depends on the code (for a corrupt row: its token).
// `reporter` is the rank that reported the failure to this one, or -1 if this rank detected it.
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

// Whether a failure is final: the communicator cannot be used afterwards, because half a collective cannot be
// undone. A failure that every rank gets from the call itself (mismatch, refusal, capacity) is not final.
MOE_HD constexpr bool is_final(const Status& s) {
  return s.code == Code::timeout || s.code == Code::lost || s.code == Code::corrupt ||
         s.code == Code::out_of_step;
}

// The detail of an `invalid` status: what is wrong with the ids (`expected` is the token, `got` the id), or
// with the order of decode calls.
enum class BadInput : int32_t {
  none = 0,
  id_out_of_range = 1,
  id_twice = 2,
  other_ids = 3,    // not the ids of the dispatch
  wrong_stage = 4,  // decode: `expected` is the stage that the call needs, `got` the stage of the epoch
};

MOE_HD constexpr Status bad_pick(BadInput bad, int64_t token, int64_t id) {
  return {
      Code::invalid, Phase::none, -1, number(bad), static_cast<uint64_t>(token), static_cast<uint64_t>(id)};
}

// The detail of a `capacity` status: what is too small.
enum class Shortage : int32_t { bytes = 0, rows = 1 };

// Whether the failed call was still completed, so that the ranks are in step for the next one.
MOE_HD constexpr bool keeps_step(const Status& s) {
  return s.code == Code::capacity || s.code == Code::mismatch || s.code == Code::refused ||
         (s.code == Code::invalid && s.detail != number(BadInput::wrong_stage));
}

#define MOE_TRY(expr)                            \
  do {                                           \
    const ::moecomm::Status moe_status = (expr); \
    if (!moe_status.ok()) return moe_status;     \
  } while (0)

// Every row and every table that is sent is 16-byte aligned: one vector access, one TMA unit.
MOE_HD constexpr uint64_t align16(uint64_t n) { return (n + 15) & ~uint64_t{15}; }
MOE_HD constexpr uint64_t align_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

}  // namespace moecomm
