#include "runtime/cpu/decode.hpp"

#include <cstring>

#include "exec/lane.hpp"
#include "schedule/decode_sequential.hpp"

namespace moecomm {
namespace {

ReachPlan reach_plan(const DecodeView& d) {
  ReachPlan p;
  p.window_bytes = d.window.bytes;
  p.window_faults = d.window.faults;
  p.warm_bytes = d.window.warm;
  p.region_bytes = d.region.bytes;
  p.region_faults = d.region.faults;
  p.region_counters = d.region.faults.value;
  p.fault_out = d.region.fault_out;
  p.own = d.geometry.rank;
  for (int r = 0; r < d.geometry.size; ++r) p.peers.push_back(d.near(r) ? -1 : r);
  return p;
}

// A failure with which ranks are not in step any more.
Status in_step(const Status& s) { return keeps_step(s) ? Status{} : s; }

// What must be equal on all ranks, as the mode bits of a flag: how rows are coded, and whether weights
// travel.
int mode_of(int code, bool weighted) { return code | (weighted ? 4 : 0); }

}  // namespace

uint64_t Decode::bytes(const Geometry& g, const Shape& s) {
  return decode_window_layout(g, s).bytes + decode_region_layout(g, s).bytes;
}

Decode::Decode(std::shared_ptr<Communicator> comm, Shape shape, bool check)
    : view_(make_decode_view(comm->geometry(), shape, check)), reach_(comm, reach_plan(view_)) {
  for (Turn& t : turns_) {
    t.memory.reset(new char[place_decode_turn(view_, nullptr, t.view)]());
    place_decode_turn(view_, t.memory.get(), t.view);
  }
}

Decode::Stage Decode::stage(uint64_t epoch) const {
  const Turn& t = turns_[epoch & 1];
  return t.view.epoch == epoch ? t.stage : Stage::idle;
}

Status Decode::dispatch(const DecodeDispatchCall& call, uint64_t& epoch) {
  const CallScope scope(reach_.comm().calls(), "decode_dispatch");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span span(recording_.get(), RecordedOp::decode_dispatch, reach_.host().counters);
  reach_.comm().begin_call(Verb::decode_dispatch, reach_.number());
  Turn& next = turn(epoch_ + 1);
  // Rules A and B. What a call of two epochs ago has come to is told by its hook: this one goes on, in step
  // with those of the others.
  if (Turn& last = turn(epoch_); last.stage == Stage::sent) MOE_TRY(in_step(receive(last)));
  if (next.stage == Stage::answered) MOE_TRY(in_step(sum(next)));
  next.outcome = {};
  next.stage = Stage::idle;
  DecodeTurn& t = next.view;
  t.epoch = epoch_ + 1;
  t.bank = t.parity();
  t.tokens = call.refused == Why::none ? call.tokens : 0;
  t.weighted = call.weighted;
  t.mode = call.refused == Why::none ? mode_of(static_cast<int>(call.quant), t.weighted) : kRefusedMode;
  t.call.scales = call.quant;
  t.call.scales_by_column = call.scales_by_column;
  t.call.row_bytes = call.quant == ScaleKind::none ? view_.shape.combine_row_bytes() : view_.shape.hidden;
  t.call.scale_bytes = 4 * scale_words(view_.shape.hidden, call.quant);
  DecodeSendArgs a;
  a.d = view_;
  a.turn = t;
  a.ids64 = call.ids64;
  a.ids32 = call.ids32;
  a.x = call.x;
  a.scales = call.scales;
  a.weights = call.weights;
  a.refused = call.refused;
  reach_.begin(false);  // staged rows are read by others next: they stay in the caches
  const Status bad = reach_.run(false, [&](auto fabric) {
    return timed(Lane{}, fabric, RoleKind::list, [&] { return decode_list(Lane{}, a, 0, t.tokens, t.sent); });
  });
  if (bad.code == Code::invalid) {  // the others learn it by this epoch's flags
    a.refused = Why::picks;
    t.mode = kRefusedMode;
  } else {
    MOE_TRY(bad);
  }
  a.turn = t;
  MOE_TRY(reach_.run(false, [&](auto fabric) { return run_decode_send(Lane{}, fabric, a); }));
  ++reach_.host().counters.calls;
  epoch = ++epoch_;
  next.stage = Stage::sent;
  if (a.refused != Why::none) return bad;  // the epoch's flags are awaited by rule A
  if (span) {
    span.call.plan = recording_->decode_plan[t.parity()] =
        recording_->add_picks(call.ids64, call.ids32, call.weights, call.tokens);
    span.call.tokens = call.tokens;
    span.call.coding = static_cast<int32_t>(call.quant);
    span.call.weighted = call.weights != nullptr;
    span.end();
  }
  return call.receive ? recorded(RecordedOp::decode_receive, epoch_, &Decode::receive) : Status{};
}

Status Decode::receive(Turn& t) {
  DecodeReceiveArgs a{view_, t.view};
  reach_.begin(streams(t, t.view.call.row_bytes));
  const Status s = reach_.run(false, [&](auto fabric) { return run_decode_receive(Lane{}, fabric, a); });
  t.stage = !s.ok() ? Stage::idle : t.view.refused() ? Stage::done : Stage::received;
  return t.outcome = s;
}

Status Decode::dispatch_receive(uint64_t epoch) {
  const CallScope scope(reach_.comm().calls(), "the hook of decode_dispatch");
  if (!scope.entered()) return {Code::interrupted};
  return recorded(RecordedOp::decode_receive, epoch,
                  stage(epoch) == Stage::sent ? &Decode::receive : nullptr);
}

// Only the rows that are there, not the whole sparse tensor.
void Decode::stage_rows(const Turn& t, const char* rows) {
  const uint64_t row_bytes = view_.shape.combine_row_bytes(),
                 per_expert = decode_rows_per_expert(view_.geometry, view_.shape);
  const RowKernels& kernels = *reach_.host().kernels;
  const int parity = t.view.parity();
  for (int e = 0; e < view_.experts_per_rank(); ++e) {
    const uint64_t at = e * per_expert * row_bytes, n = counts(parity)[e];
    (reach_.host().stream ? kernels.stream : kernels.copy)(this->rows(parity) + at, rows + at, n * row_bytes);
    reach_.host().counters.staged_rows += n;
  }
}

// No answers, but word of it; those of others are awaited by rule B.
Status Decode::refuse_combine(Turn& t, Why why) {
  reach_.begin(false);
  t.refused = why;
  DecodeCombineArgs a{view_, t.view, 0, Wire::plain, nullptr, nullptr, why};
  MOE_TRY(reach_.run(false, [&](auto fabric) { return run_decode_combine_send(Lane{}, fabric, a); }));
  t.stage = Stage::answered;
  return {};
}

Status Decode::refuse_combine(uint64_t epoch, Why why) {
  const CallScope scope(reach_.comm().calls(), "decode_combine");
  if (!scope.entered()) return {Code::interrupted};
  if (stage(epoch) != Stage::sent && stage(epoch) != Stage::received) return {};
  reach_.comm().begin_call(Verb::decode_combine, reach_.number());
  if (stage(epoch) == Stage::sent) MOE_TRY(in_step(receive(turn(epoch))));
  return stage(epoch) == Stage::received ? refuse_combine(turn(epoch), why) : Status{};
}

Status Decode::combine(const DecodeCombineCall& call) {
  const CallScope scope(reach_.comm().calls(), "decode_combine");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span span(recording_.get(), RecordedOp::decode_combine, reach_.host().counters);
  reach_.comm().begin_call(Verb::decode_combine, reach_.number());
  Turn& t = turn(call.epoch);
  if (const Stage now = stage(call.epoch); now != Stage::received)  // another thread was faster
    return {Code::invalid, Phase::none, -1, 4, Stage::received, static_cast<uint64_t>(now)};
  const int64_t picks = int64_t{t.view.tokens} * view_.shape.top_k;
  for (int64_t i = 0; i < picks; ++i)
    if (const int64_t id = call.ids64 ? call.ids64[i] : call.ids32[i]; id != t.view.ids[i]) {
      MOE_TRY(refuse_combine(t, Why::picks));
      return {Code::invalid,
              Phase::none,
              -1,
              3,
              static_cast<uint64_t>(i / view_.shape.top_k),
              static_cast<uint64_t>(id)};
    }
  for (int64_t i = 0; i < picks; ++i) t.view.weights[i] = call.weights ? call.weights[i] : 1.0f;
  reach_.begin(streams(t, view_.shape.combine_row_bytes()));
  t.combine_mode = mode_of(static_cast<int>(call.wire), t.view.weighted);
  t.wire = call.wire;
  t.y = call.y;
  t.refused = Why::none;
  DecodeCombineArgs a{view_, t.view, t.combine_mode, t.wire, call.rows, nullptr};
  if (!t.view.weighted && call.rows != rows(t.view.parity())) {
    stage_rows(t, call.rows);
    a.rows = rows(t.view.parity());
  }
  MOE_TRY(reach_.run(false, [&](auto fabric) { return run_decode_combine_send(Lane{}, fabric, a); }));
  ++reach_.host().counters.calls;
  t.stage = Stage::answered;
  if (span) {
    if (call.weights) recording_->add_weights(call.weights, t.view.tokens);
    span.call.plan = recording_->decode_plan[t.view.parity()];
    span.call.tokens = t.view.tokens;
    span.call.coding = static_cast<int32_t>(call.wire);
    span.call.weighted = call.weights != nullptr;
    span.end();
  }
  return call.receive ? recorded(RecordedOp::decode_sum, call.epoch, &Decode::sum) : Status{};
}

Status Decode::sum(Turn& t) {
  DecodeCombineArgs a{view_, t.view, t.combine_mode, t.wire, nullptr, t.y, t.refused};
  reach_.begin(false);
  const Status s =
      reach_.run(true, [&](auto fabric) { return run_decode_combine_receive(Lane{}, fabric, a); });
  t.stage = Stage::done;
  return t.outcome = s;
}

Status Decode::combine_receive(uint64_t epoch) {
  const CallScope scope(reach_.comm().calls(), "the hook of decode_combine");
  if (!scope.entered()) return {Code::interrupted};
  return recorded(RecordedOp::decode_sum, epoch, stage(epoch) == Stage::answered ? &Decode::sum : nullptr);
}

// A receive phase; null: it has run already, by one of the rules.
Status Decode::recorded(RecordedOp op, uint64_t epoch, Status (Decode::*phase)(Turn&)) {
  Recording::Span span(recording_.get(), op, reach_.host().counters);
  Turn& t = turn(epoch);
  const Status s = phase ? (this->*phase)(t) : t.view.epoch == epoch ? t.outcome : Status{};
  if (span && s.ok()) {
    span.call.plan = recording_->decode_plan[epoch & 1];
    span.call.tokens = t.view.tokens;
    span.end();
  }
  return s;
}

void Decode::trace(bool on) {
  std::lock_guard lock(reach_.comm().calls());
  reach_.trace(on);
}

std::vector<RoleSpan> Decode::take_timeline() {
  std::lock_guard lock(reach_.comm().calls());
  return reach_.take_timeline();
}

void Decode::record(std::shared_ptr<Recording> recording) {
  std::lock_guard lock(reach_.comm().calls());
  recording_ = std::move(recording);
}

Counters Decode::counters() {
  std::lock_guard lock(reach_.comm().calls());
  return reach_.host().counters;
}

Counters Decode::take_counters() {
  std::lock_guard lock(reach_.comm().calls());
  const Counters c = reach_.host().counters;
  reach_.host().counters = {};
  return c;
}

}  // namespace moecomm
