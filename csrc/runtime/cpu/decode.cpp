#include "runtime/cpu/decode.hpp"

#include <algorithm>
#include <cstring>

#include "exec/lane.hpp"
#include "schedule/decode_sequential.hpp"

namespace moecomm {
namespace {

PeerMemoryLayout peer_memory_layout(const DecodeView& d) {
  PeerMemoryLayout p;
  p.window_bytes = d.window.bytes;
  p.window_faults = d.window.faults;
  p.warm_bytes = d.window.warm;
  p.region_bytes = d.region.bytes;
  p.region_faults = d.region.faults;
  p.region_counters = d.region.faults.value;
  p.fault_out = d.region.fault_out;
  p.own = d.geometry.rank;
  for (int r = 0; r < d.geometry.size; ++r) p.peers.push_back(d.same_node(r) ? -1 : r);
  return p;
}

}  // namespace

uint64_t Decode::bytes(const Geometry& g, const Shape& s) {
  return decode_window_layout(g, s).bytes + decode_region_layout(g, s).bytes;
}

Decode::Decode(std::shared_ptr<Communicator> comm, Shape shape, bool check)
    : view_(make_decode_view(comm->geometry(), shape, check)), peer_memory_(comm, peer_memory_layout(view_)) {
  for (Turn& t : turns_) {
    t.memory.reset(new char[place_decode_turn(view_, nullptr, t.view)]());
    place_decode_turn(view_, t.memory.get(), t.view);
  }
}

Status Decode::dispatch(const DecodeDispatchCall& call, uint64_t& epoch) {
  const CallScope scope(peer_memory_.comm().calls(), "decode_dispatch");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span span(recording_.get(), RecordedOp::decode_dispatch, peer_memory_.host().counters);
  peer_memory_.comm().begin_call(Verb::decode_dispatch, peer_memory_.number());
  MOE_TRY(order_.before_dispatch([&](uint64_t e) { return in_step(receive(turn(e))); },
                                 [&](uint64_t e) { return in_step(sum(turn(e))); }));
  order_.open();
  Turn& next = turn(order_.next());
  next.outcome = {};
  DecodeTurn& t = next.view;
  open_turn(t, view_, order_.next(), call);
  DecodeSendArgs a = make_decode_send_args(view_, t, call);
  peer_memory_.begin(false);  // peers read the staged rows next, so keep them in the caches
  const Status bad = peer_memory_.run(false, [&](auto fabric) {
    return timed(Lane{}, fabric, RoleKind::list, [&] { return decode_list(Lane{}, a, 0, t.tokens, t.sent); });
  });
  if (bad.code == Code::invalid) {  // this epoch's flags announce the refusal to the other ranks
    DecodeDispatchCall made = call;
    made.refused = Why::picks;
    open_turn(t, view_, order_.next(), made);
    a = make_decode_send_args(view_, t, made);
  } else {
    MOE_TRY(bad);
  }
  MOE_TRY(peer_memory_.run(false, [&](auto fabric) { return run_decode_send(Lane{}, fabric, a); }));
  ++peer_memory_.host().counters.calls;
  order_.sent();
  epoch = order_.latest();
  if (a.refused != Why::none) return bad;  // by rule (A) the next dispatch waits for this epoch's flags
  if (span) {
    span.call.plan = recording_->decode_plan[t.parity()] =
        recording_->add_picks(call.ids64, call.ids32, call.weights, call.tokens);
    span.call.tokens = call.tokens;
    span.call.coding = static_cast<int32_t>(call.quant);
    span.call.weighted = call.weights != nullptr;
    span.end();
  }
  return call.receive ? recorded(RecordedOp::decode_receive, epoch, &Decode::receive) : Status{};
}

Status Decode::receive(Turn& t) {
  const DecodeReceiveArgs a = make_decode_receive_args(view_, t.view);
  peer_memory_.begin(streams(t, t.view.call.row_bytes));
  const Status s =
      peer_memory_.run(false, [&](auto fabric) { return run_decode_receive(Lane{}, fabric, a); });
  order_.received(t.view.epoch, s.ok(), t.view.refused());
  return t.outcome = s;
}

Status Decode::dispatch_receive(uint64_t epoch) {
  const CallScope scope(peer_memory_.comm().calls(), "the hook of decode_dispatch");
  if (!scope.entered()) return {Code::interrupted};
  return recorded(RecordedOp::decode_receive, epoch,
                  stage(epoch) == DecodeStage::sent ? &Decode::receive : nullptr);
}

// Copies only the rows that exist, not the whole sparse tensor.
void Decode::stage_rows(const Turn& t, const char* rows) {
  const uint64_t row_bytes = view_.shape.combine_row_bytes(),
                 per_expert = decode_rows_per_expert(view_.geometry, view_.shape);
  const RowKernels& kernels = *peer_memory_.host().kernels;
  const int parity = t.view.parity();
  for (int e = 0; e < view_.experts_per_rank(); ++e) {
    const uint64_t at = e * per_expert * row_bytes, n = counts(parity)[e];
    (peer_memory_.host().stream ? kernels.stream : kernels.copy)(this->rows(parity) + at, rows + at,
                                                                 n * row_bytes);
    peer_memory_.host().counters.staged_rows += n;
  }
}

// A further combine of an epoch first waits until its places are free. Rows may be written after it.
Status Decode::begin_combine(Turn& t) {
  t.view.combine = order_.combines(t.view.epoch);
  if (t.view.combine == 0) return {};
  return peer_memory_.run(false,
                          [&](auto fabric) { return run_decode_release(Lane{}, fabric, view_, t.view); });
}

// Announces the refusal instead of answers. By rule (B) the answers of other ranks are still awaited.
Status Decode::refuse_combine(Turn& t, Why why) {
  peer_memory_.begin(false);
  DecodeCombineCall refused;
  refused.refused = why;
  t.answer = make_decode_answer(t.view, refused);
  MOE_TRY(begin_combine(t));
  const DecodeCombineArgs a = make_decode_combine_args(view_, t.view, t.answer, nullptr);
  MOE_TRY(peer_memory_.run(false, [&](auto fabric) { return run_decode_combine_send(Lane{}, fabric, a); }));
  order_.answered(t.view.epoch, true);
  return {};
}

Status Decode::refuse_combine(uint64_t epoch, Why why) {
  const CallScope scope(peer_memory_.comm().calls(), "decode_combine");
  if (!scope.entered()) return {Code::interrupted};
  if (stage(epoch) != DecodeStage::sent && !can_combine(stage(epoch))) return {};
  peer_memory_.comm().begin_call(Verb::decode_combine, peer_memory_.number());
  if (stage(epoch) == DecodeStage::sent) MOE_TRY(in_step(receive(turn(epoch))));
  return can_combine(stage(epoch)) ? refuse_combine(turn(epoch), why) : Status{};
}

Status Decode::combine(const DecodeCombineCall& call) {
  const CallScope scope(peer_memory_.comm().calls(), "decode_combine");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span span(recording_.get(), RecordedOp::decode_combine, peer_memory_.host().counters);
  peer_memory_.comm().begin_call(Verb::decode_combine, peer_memory_.number());
  Turn& t = turn(call.epoch);
  if (const DecodeStage now = stage(call.epoch); !can_combine(now))  // another thread has begun a combine
    return wrong_stage(DecodeStage::received, now);
  const int64_t picks = int64_t{t.view.tokens} * view_.shape.top_k;
  for (int64_t i = 0; i < picks; ++i)
    if (const int64_t id = call.ids64 ? call.ids64[i] : call.ids32[i]; view_.served(id) != t.view.ids[i]) {
      MOE_TRY(refuse_combine(t, Why::picks));
      return bad_pick(BadInput::other_ids, i / view_.shape.top_k, id);
    }
  for (int64_t i = 0; i < picks; ++i) t.view.weights[i] = call.weights ? call.weights[i] : 1.0f;
  peer_memory_.begin(streams(t, view_.shape.combine_row_bytes()));
  t.answer = make_decode_answer(t.view, call);
  MOE_TRY(begin_combine(t));
  const char* rows = call.rows;
  if (!t.view.weighted && rows != this->rows(t.view.parity())) {
    stage_rows(t, rows);
    rows = this->rows(t.view.parity());
  }
  const DecodeCombineArgs a = make_decode_combine_args(view_, t.view, t.answer, rows);
  MOE_TRY(peer_memory_.run(false, [&](auto fabric) { return run_decode_combine_send(Lane{}, fabric, a); }));
  ++peer_memory_.host().counters.calls;
  order_.answered(t.view.epoch, false);
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
  const DecodeCombineArgs a = make_decode_combine_args(view_, t.view, t.answer, nullptr);
  peer_memory_.begin(false);
  const Status s =
      peer_memory_.run(true, [&](auto fabric) { return run_decode_combine_receive(Lane{}, fabric, a); });
  order_.summed(t.view.epoch, s.ok());
  return t.outcome = s;
}

Status Decode::combine_receive(uint64_t epoch) {
  const CallScope scope(peer_memory_.comm().calls(), "the hook of decode_combine");
  if (!scope.entered()) return {Code::interrupted};
  return recorded(RecordedOp::decode_sum, epoch,
                  stage(epoch) == DecodeStage::answered ? &Decode::sum : nullptr);
}

// Runs and records a receive phase. phase is null if one of the rules has run it already.
Status Decode::recorded(RecordedOp op, uint64_t epoch, Status (Decode::*phase)(Turn&)) {
  Recording::Span span(recording_.get(), op, peer_memory_.host().counters);
  if (lost_ >= 0 && epoch <= before_mask_) return {Code::lost, Phase::none, lost_};  // no result after a mask
  Turn& t = turn(epoch);
  const Status s = phase ? (this->*phase)(t) : t.view.epoch == epoch ? t.outcome : Status{};
  if (span && s.ok()) {
    span.call.plan = recording_->decode_plan[epoch & 1];
    span.call.tokens = t.view.tokens;
    span.end();
  }
  return s;
}

// The next epoch, because a dispatch that failed may already have sent some of its flags.
uint64_t Decode::rest() {
  std::lock_guard lock(peer_memory_.comm().calls());
  return order_.next();
}

void Decode::mask(const std::vector<uint8_t>& masked, uint64_t latest, uint64_t calls) {
  std::lock_guard lock(peer_memory_.comm().calls());
  lost_ = static_cast<int>(std::find(masked.begin(), masked.end(), 1) - masked.begin());
  before_mask_ = order_.latest();
  masked_ = masked;
  view_.mask = masked_.data();
  order_.drop();
  order_.skip_to(latest);
  peer_memory_.continue_without(masked_, lost_, calls);
}

void Decode::trace(bool on) {
  std::lock_guard lock(peer_memory_.comm().calls());
  peer_memory_.trace(on);
}

std::vector<RoleSpan> Decode::take_timeline() {
  std::lock_guard lock(peer_memory_.comm().calls());
  return peer_memory_.take_timeline();
}

void Decode::record(std::shared_ptr<Recording> recording) {
  std::lock_guard lock(peer_memory_.comm().calls());
  recording_ = std::move(recording);
}

Counters Decode::counters() {
  std::lock_guard lock(peer_memory_.comm().calls());
  return peer_memory_.host().counters;
}

Counters Decode::take_counters() {
  std::lock_guard lock(peer_memory_.comm().calls());
  const Counters c = peer_memory_.host().counters;
  peer_memory_.host().counters = {};
  return c;
}

}  // namespace moecomm
