// Recording: the calls of a rank's Buffer and what they moved. They are kept in memory until a segment is
// taken to be written to a file (moecomm/tracing/format.py, which also describes the fields). Buffer and
// Decode add to it while they hold the lock of their calls.
#pragma once
#include <atomic>
#include <chrono>
#include <utility>
#include <vector>

#include "base/counters.hpp"
#include "fabric/cpu/host.hpp"

namespace moecomm {

enum class RecordedOp : int32_t {
  dispatch,
  combine,
  decode_dispatch,
  decode_receive,
  decode_combine,
  decode_sum
};

struct RecordedCall {
  int64_t plan = -1;  // number of its dispatch, among the dispatches whose picks are recorded
  int64_t capacity = -1;
  int64_t begin = 0, end = 0;  // ns of the steady clock
  uint64_t spans = 0;          // of roles, since the segment began
  HopCounters rail, node;      // what the call moved
  uint64_t replicated_rows = 0;
  RecordedOp op = RecordedOp::dispatch;
  int32_t tokens = 0;
  int32_t alignment = 1;
  int32_t coding = 0;  // the ScaleKind of a dispatch, the Wire of a combine
  int32_t cached = 0, weighted = 0, by_rank = 0, unused = 0;
};

static_assert(sizeof(RecordedCall) == 144, "moecomm/tracing/format.py reads these");

class Recording {
 public:
  struct Segment {
    std::vector<RecordedCall> calls;
    std::vector<int16_t> ids16;  // of every dispatch that made a plan; ids16 or ids32 is used
    std::vector<int32_t> ids32;
    std::vector<float> weights;
    std::vector<RoleSpan> spans;
  };

  Recording(int top_k, int num_experts) : top_k_(top_k), wide_(num_experts > 32768) {}

  // Records one call. The change of `counters` during the span is what the call moved.
  class Span;

  int64_t add_picks(const int64_t* ids64, const int32_t* ids32, const float* weights, int tokens) {
    if (ids64)
      add_ids(ids64, tokens);
    else
      add_ids(ids32, tokens);
    if (weights) add_weights(weights, tokens);
    return plans_++;
  }
  void add_weights(const float* weights, int tokens) {
    now_.weights.insert(now_.weights.end(), weights, weights + int64_t{tokens} * top_k_);
  }

  std::vector<RoleSpan>& spans() { return now_.spans; }
  // Bytes of the segment; may be called on any thread.
  uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
  Segment take() {
    bytes_ = 0;
    return std::exchange(now_, {});
  }
  int64_t decode_plan[2] = {-1, -1};  // by parity

 private:
  template <class Id>
  void add_ids(const Id* ids, int tokens) {
    const int64_t n = int64_t{tokens} * top_k_;
    if (wide_)
      now_.ids32.insert(now_.ids32.end(), ids, ids + n);
    else
      now_.ids16.insert(now_.ids16.end(), ids, ids + n);
  }
  int top_k_;
  bool wide_;
  int64_t plans_ = 0;
  Segment now_;
  std::atomic<uint64_t> bytes_ = 0;
};

class Recording::Span {
 public:
  Span(Recording* recording, RecordedOp op, const Counters& counters)
      : recording_(recording), counters_(counters) {
    if (!recording_) return;
    before_ = counters;
    call.op = op;
    call.begin = now();
  }
  explicit operator bool() const { return recording_ != nullptr; }
  void end() {
    if (!recording_) return;
    call.end = now();
    Segment& s = recording_->now_;
    call.spans = s.spans.size();
    call.rail = since(counters_.rail, before_.rail);
    call.node = since(counters_.node, before_.node);
    call.replicated_rows = counters_.replicated_rows - before_.replicated_rows;
    s.calls.push_back(call);
    recording_->bytes_ = s.calls.size() * sizeof(RecordedCall) + s.ids16.size() * 2 +
                         (s.ids32.size() + s.weights.size()) * 4 + s.spans.size() * sizeof(RoleSpan);
  }
  RecordedCall call;

 private:
  static HopCounters since(const HopCounters& a, const HopCounters& b) {
    return {a.logical_rows - b.logical_rows, a.physical_rows - b.physical_rows,
            a.logical_bytes - b.logical_bytes, a.physical_bytes - b.physical_bytes};
  }
  static int64_t now() {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
  }
  Recording* recording_;
  const Counters& counters_;
  Counters before_;
};

}  // namespace moecomm
