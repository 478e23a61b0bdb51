// The arguments that a caller passes to the verbs, in every world that moves memory. The memory that they
// point to must stay valid until the call has completed.
#pragma once
#include "base/codes.hpp"
#include "base/wire.hpp"

namespace moecomm {

namespace balance {
class ReplicaPolicy;
}

// A rank's tokens and their picks.
struct Tokens {
  const char* x = nullptr;
  const char* scales = nullptr;    // of rows that are already quantized
  const int64_t* ids64 = nullptr;  // the picks are in ids64 or in ids32; the other one is null
  const int32_t* ids32 = nullptr;
  const float* weights = nullptr;
  int32_t tokens = 0;
  Why refused = Why::none;  // set: this rank only announces its refusal; other fields are ignored
};

struct DispatchCall : Tokens {
  bool cached = false;
  CallShape shape;
  const balance::ReplicaPolicy* policy = nullptr;  // set: ids64 are logical experts, and `slots` is written
  int64_t* slots = nullptr;                        // [T, K] out: the chosen expert slots
  // [E] out: picks per logical expert; of all ranks if the choice needs them, else of this rank.
  int32_t* counted = nullptr;
};

struct CombineCall {
  const char* rows = nullptr;  // rows outside this rank's window are copied to staging first
  const float* weights = nullptr;
  const float* back = nullptr;  // one f32 per row (rank layout: per row and k), returned to the picks
  char* y = nullptr;
  // [T, K] out: the returned `back` values. Null on all ranks or on none, else the call is a mismatch.
  float* returned = nullptr;
  bool sums_back = false;  // as in CombineArgs
  const float* bias = nullptr;
  int64_t bias_stride = 0;
  Wire wire = Wire::plain;
  Why refused = Why::none;  // as in Tokens
};

struct DecodeDispatchCall : Tokens {
  bool weighted = false;              // weights are sent too
  ScaleKind quant = ScaleKind::none;  // of the rows as they are sent; if `scales` is null, dispatch quantizes
  bool scales_by_column = false;      // layout of the scales at the receiver
  bool receive = false;               // run both phases in one call
};

struct DecodeCombineCall {
  uint64_t epoch = 0;
  const char* rows = nullptr;      // [E/R, R * max_tokens, H]; unless they are rows(epoch): staged first
  const int64_t* ids64 = nullptr;  // must be the ids of the dispatch
  const int32_t* ids32 = nullptr;
  const float* weights = nullptr;  // null: 1
  Wire wire = Wire::plain;         // of the answers that cross nodes
  char* y = nullptr;               // written by the receive phase
  bool receive = false;
  Why refused = Why::none;  // as in Tokens, except that `epoch` is used too
};

// The status of a call that no host waits for. If a rank refuses it, or the ranks disagree about it, each
// rank has gone on by the time its host sees the status. Ranks are then out of step, which is a final
// failure.
MOE_HD constexpr void end_unawaited(Status& s, Verb verb) {
  if (s.code != Code::refused && s.code != Code::mismatch) return;
  s.detail = verbs_detail(verb, s.code == Code::refused ? Verb::refused_late : Verb::differs_late);
  s.code = Code::out_of_step;
}

// The same call, enqueued on a stream of a GPU (a cudaStream_t).
template <class Call>
struct OnStream : Call {
  void* stream = nullptr;
};

}  // namespace moecomm
