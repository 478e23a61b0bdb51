#include "runtime/cpu/buffer.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "balance/route.hpp"
#include "exec/lane.hpp"
#include "runtime/replica_chooser.hpp"
#include "schedule/sequential.hpp"
#include "session/arguments.hpp"
#include "session/staging.hpp"

namespace moecomm {
namespace {

uint64_t env_bytes(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

// Bytes of the arena that the first balanced dispatches use. If they are populated at start, these calls
// cause no page faults. Pages that only an extreme routing needs are committed when they are first touched.
uint64_t usual_bytes(const BufferView& view) {
  const Shape& s = view.shape;
  return std::min(uint64_t{4} * s.max_tokens * s.top_k * s.combine_row_bytes(), s.arena_bytes);
}

PeerMemoryLayout peer_memory_layout(const BufferView& view, uint64_t populated) {
  PeerMemoryLayout p;
  p.window_bytes = view.node.bytes;
  p.window_faults = view.node.faults;
  p.warm_bytes = view.node.arena.value + populated;
  p.region_bytes = view.rail.bytes;
  p.region_faults = view.rail.faults;
  p.region_counters = view.rail.faults.value;
  p.fault_out = view.rail.fault_out;
  p.own = view.geometry.node();
  for (int n = 0; n < view.geometry.nodes(); ++n)
    p.peers.push_back(n == p.own ? -1 : view.geometry.rail_rank(n));
  return p;
}

}  // namespace

Buffer::Populated::Populated(Communicator& comm, uint64_t wanted)
    : comm(comm),
      bytes(comm.take_populated(wanted, env_bytes("MOECOMM_POPULATE_BYTES", uint64_t{256} << 20))) {}

uint64_t Buffer::bytes(const Geometry& g, const Shape& s) {
  return node_layout(g, s).bytes + rail_layout(g, s).bytes;
}

Buffer::Buffer(std::shared_ptr<Communicator> comm, Shape shape, bool check)
    : comm_(std::move(comm)),
      view_(make_view(comm_->geometry(), shape, check)),
      populated_(*comm_, usual_bytes(view_)),
      peer_memory_(comm_, peer_memory_layout(view_, populated_.bytes)) {
  arena_ = std::make_shared<Arena>(view_.node.arena, view_.node.arena + shape.arena_bytes,
                                   dispatch_bound(view_.geometry, shape));
  pool_ = std::make_shared<PlanPool>(view_);
  const uint64_t per_peer = static_cast<uint64_t>(view_.geometry.nodes()) * shape.channels;
  consumed_counts_.assign(2 * per_peer, 0);
  consumed_.rows = consumed_counts_.data();
  consumed_.back = consumed_counts_.data() + per_peer;
}

void Buffer::begin_call(Verb verb, uint64_t bytes_moved) {
  comm_->begin_call(verb, peer_memory_.number());
  peer_memory_.begin(bytes_moved >= stream_threshold_);
  ++peer_memory_.host().counters.calls;
}

bool Buffer::ask(const DispatchCall& call, DispatchCall& made, Status& bad) {
  const balance::ReplicaPolicy& choice = *call.policy;
  const balance::Refusal refusal = balance::count_picks(call.ids64, call.tokens, view_.shape.top_k,
                                                        choice.replicas().experts, call.counted);
  if (refusal.bad != BadInput::none) {
    bad = bad_pick(refusal.bad, refusal.token, refusal.id);
    made.refused = Why::picks;
    made.ids64 = nullptr;
    return false;
  }
  made.ids64 = call.slots;
  if (!choice.needs_all()) {
    choice.route(choice.solve(nullptr, ++rotation_),
                 {call.ids64, call.tokens, view_.shape.top_k, call.counted}, view_.geometry.rank, nullptr,
                 call.slots);
    return false;
  }
  fill_logical_blocks(view_, call, logical_blocks_);
  return true;
}

Status Buffer::choose(const DispatchCall& call) {
  const CallScope scope(comm_->calls(), "choose");
  if (!scope.entered()) return {Code::interrupted};
  DispatchCall made = call;
  Status bad;
  if (call.refused == Why::none && !ask(call, made, bad) && !call.policy->needs_all())
    return bad;  // the other ranks are not involved
  begin_call(Verb::choose, 0);
  const bool chooses = made.refused == Why::none;
  if (!chooses) logical_blocks_.assign(size_t(view_.geometry.nodes()) * view_.count.ints, 0);
  const DispatchArgs a =
      make_exchange_args(view_, &consumed_, call.shape, made.refused, logical_blocks_.data());
  if (chooses) {
    ReplicaChooser chooser(view_, call, consumed_.counts);
    return peer_memory_.run(true, [&](auto fabric) {
      return run_exchange(Lane{}, fabric, a, [&](auto picks_of) { chooser.choose(picks_of); });
    });
  }
  const Status s =
      peer_memory_.run(true, [&](auto fabric) { return run_exchange(Lane{}, fabric, a, [](auto) {}); });
  return bad.ok() ? s : bad;
}

Status Buffer::dispatch(const DispatchCall& call, Plan& plan, std::shared_ptr<Block>& out,
                        std::shared_ptr<Block>& output, FirstPhase* first) {
  const CallScope scope(comm_->calls(), "dispatch");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span recorded(recording_.get(), RecordedOp::dispatch, peer_memory_.host().counters);
  const uint64_t copies = std::min<uint64_t>(view_.shape.top_k, view_.geometry.size);
  begin_call(Verb::dispatch, call.shape.row_bytes * call.tokens * copies);
  DispatchCall made = call;
  Status s, bad;
  const bool asks = call.policy && !call.cached && call.refused == Why::none && ask(call, made, bad);
  if (made.refused == Why::none && !call.cached) plan.owner = this;
  open_plan(plan.view, made);
  const DispatchArgs a = make_dispatch_args(view_, plan.view, &consumed_, plan.scratch(), made,
                                            asks ? logical_blocks_.data() : nullptr);
  const Offer offer = arena_->offer();
  const auto placed = [&] {
    const uint64_t rows = static_cast<uint64_t>(local_rows(plan));
    const HeldPiece held = hold(peer_memory_.window(), arena_, piece_of(view_, plan.view.call, rows, offer));
    out = held.block;
    output = held.output;
    if (first) first->placed();
  };
  if (asks) {
    ReplicaChooser chooser(view_, call, consumed_.dispatches);
    s = peer_memory_.run(
        true, [&](auto fabric) { return run_dispatch(Lane{}, fabric, a, offer, chooser, placed); });
  } else {
    s = peer_memory_.run(true, [&](auto fabric) { return run_dispatch(Lane{}, fabric, a, offer, placed); });
  }
  if (!bad.ok()) return bad;
  if (!s.ok()) return s;
  const CallShape& shape = plan.view.call;
  if (recorded) {
    if (!call.cached)
      plan.recorded =
          recording_->add_picks(call.slots ? call.slots : call.ids64, call.ids32, call.weights, call.tokens);
    recorded.call.plan = plan.recorded;
    recorded.call.capacity = shape.capacity;
    recorded.call.tokens = plan.view.tokens;
    recorded.call.alignment = call.cached ? 1 : shape.alignment;
    recorded.call.coding = static_cast<int32_t>(shape.scales);
    recorded.call.cached = call.cached;
    recorded.call.weighted = call.weights != nullptr;
    recorded.call.by_rank = shape.layout == RowLayout::rank;
    recorded.end();
  }
  return s;
}

Status Buffer::refuse_combine(Why why) {
  const CallScope scope(comm_->calls(), "combine");
  if (!scope.entered()) return {Code::interrupted};
  std::vector<RowsBoard> boards(view_.geometry.ranks_per_node);
  const CombineArgs a = make_refused_combine_args(view_, &consumed_, boards.data(), why);
  begin_call(Verb::combine, 0);
  return peer_memory_.run(true, [&](auto fabric) { return run_combine(Lane{}, fabric, a); });
}

Status Buffer::combine(const CombineCall& call, Plan& plan, const Block& output) {
  const CallScope scope(comm_->calls(), "combine");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span recorded(recording_.get(), RecordedOp::combine, peer_memory_.host().counters);
  const uint64_t rows = local_rows(plan);
  const bool by_rank = plan.view.call.layout == RowLayout::rank;
  begin_call(Verb::combine, rows * view_.shape.combine_row_bytes());
  HostState& host = peer_memory_.host();
  char* window = peer_memory_.window()->data();
  const RowsBoard board = place_rows(
      view_, plan.view.call, call, window, output.offset(), rows,
      [&](uint64_t at, const char* from, uint64_t bytes) {
        (host.stream ? host.kernels->stream : host.kernels->copy)(window + at, from, bytes);
        host.counters.staged_rows += rows;
      },
      [&](uint64_t at, const float* from, uint64_t count) { std::memcpy(window + at, from, count * 4); });
  std::vector<RowsBoard> boards(view_.geometry.ranks_per_node);
  const CombineArgs a = make_combine_args(view_, plan.view, &consumed_, boards.data(), board, call);
  const Status s = peer_memory_.run(true, [&](auto fabric) { return run_combine(Lane{}, fabric, a); });
  if (recorded && s.ok()) {
    recorded.call.plan = plan.recorded;
    recorded.call.tokens = plan.view.tokens;
    recorded.call.coding = static_cast<int32_t>(call.wire);
    recorded.call.cached = true;
    recorded.call.weighted = call.weights != nullptr;
    recorded.call.by_rank = by_rank;
    recorded.end();
  }
  return s;
}

Counters Buffer::counters() {
  std::lock_guard lock(comm_->calls());
  return peer_memory_.host().counters;
}

Counters Buffer::take_counters() {
  std::lock_guard lock(comm_->calls());
  const Counters c = peer_memory_.host().counters;
  peer_memory_.host().counters = {};
  return c;
}

void Buffer::trace(bool on) {
  std::lock_guard lock(comm_->calls());
  peer_memory_.trace(on);
}

void Buffer::record(std::shared_ptr<Recording> recording) {
  std::lock_guard lock(comm_->calls());
  recording_ = std::move(recording);
  peer_memory_.host().timeline = recording_ ? &recording_->spans() : nullptr;
}

Recording::Segment Buffer::take(Recording& recording) {
  std::lock_guard lock(comm_->calls());
  return recording.take();
}

std::vector<RoleSpan> Buffer::take_timeline() {
  std::lock_guard lock(comm_->calls());
  return peer_memory_.take_timeline();
}

}  // namespace moecomm
