// What a caller gives to the verbs, in every world that moves memory. What it points to stays until the call
// is over.
#pragma once
#include "base/codes.hpp"
#include "base/wire.hpp"

namespace moecomm {

namespace balance {
class Choice;
}

// A rank's tokens and where they want to go.
struct Tokens {
  const char* x = nullptr;
  const char* scales = nullptr;    // of rows that are quantized already
  const int64_t* ids64 = nullptr;  // one of the two kinds of ids
  const int32_t* ids32 = nullptr;
  const float* weights = nullptr;
  int32_t tokens = 0;
  Why refused = Why::none;  // this rank takes no part but to tell the others: nothing else of the call counts
};

struct DispatchCall : Tokens {
  bool cached = false;
  CallShape shape;
  const balance::Choice* choice = nullptr;  // ids64 are logical: their slots are chosen, and written to
  int64_t* slots = nullptr;                 // [T, K]
  int32_t* counted =
      nullptr;  // [E] out: picks per expert, of all ranks where the choice needs them, else of this one
};

struct CombineCall {
  const char* rows = nullptr;  // in this rank's window, or anywhere: then it is staged once
  const float* weights = nullptr;
  const float* back = nullptr;  // one f32 per row (rank layout: per row and slot), for the picks' slots
  char* y = nullptr;
  float* slots =
      nullptr;  // [T, K], where `back` goes; null on all ranks or on none, else the call is a mismatch
  const float* bias = nullptr;
  int64_t bias_stride = 0;
  Wire wire = Wire::plain;
};

struct DecodeDispatchCall : Tokens {
  bool weighted = false;              // weights travel
  ScaleKind quant = ScaleKind::none;  // of the rows that travel; made on the way where `scales` is null
  bool scales_by_column = false;      // at the receiver
  bool receive = false;               // both phases in one call
};

struct DecodeCombineCall {
  uint64_t epoch = 0;
  const char* rows = nullptr;      // [E/R, R * max_tokens, H]: rows(epoch), or anywhere: then staged once
  const int64_t* ids64 = nullptr;  // must be those of the dispatch
  const int32_t* ids32 = nullptr;
  const float* weights = nullptr;  // null: 1
  Wire wire = Wire::plain;         // of the answers that cross between nodes
  char* y = nullptr;               // written by the receive phase
  bool receive = false;
  Why refused = Why::none;  // as in Tokens; the epoch counts
};

// A refusal by which a call ended that no host has waited for: the ranks have gone on since, each as far as
// it did.
constexpr Status refused_late(const Status& s) {
  Status late = s;
  late.code = Code::out_of_step;
  late.detail = verbs_detail(Verb::unknown, Verb::refused_late);
  return late;
}

// A combine that no host has waited for and that ranks have called in different ways.
constexpr bool ends_late(const Status& s) { return s.code == Code::mismatch && s.phase == Phase::publish; }

// The same call, enqueued on a stream of a GPU (a cudaStream_t).
template <class Call>
struct OnStream : Call {
  void* stream = nullptr;
};

}  // namespace moecomm
