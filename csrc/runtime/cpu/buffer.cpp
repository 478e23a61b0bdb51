#include "runtime/cpu/buffer.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "balance/route.hpp"
#include "exec/lane.hpp"
#include "runtime/chooser.hpp"
#include "schedule/sequential.hpp"

namespace moecomm {
namespace {

uint64_t env_bytes(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

// The first balanced dispatches should meet warm pages; what an extreme routing needs beyond is committed
// when it is first touched.
uint64_t warm_bytes(const BufferView& view) {
  const Shape& s = view.shape;
  const uint64_t usual = 4ull * s.max_tokens * s.top_k * s.combine_row_bytes();
  const uint64_t limit = env_bytes("MOECOMM_POPULATE_BYTES", uint64_t{256} << 20);
  return std::min(view.node.bytes, view.node.arena.value + std::min(usual, limit));
}

ReachPlan reach_plan(const BufferView& view) {
  ReachPlan p;
  p.window_bytes = view.node.bytes;
  p.window_faults = view.node.faults;
  p.warm_bytes = warm_bytes(view);
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

uint64_t Buffer::bytes(const Geometry& g, const Shape& s) {
  return node_layout(g, s).bytes + rail_layout(g, s).bytes;
}

Buffer::Buffer(std::shared_ptr<Communicator> comm, Shape shape, bool check)
    : comm_(std::move(comm)),
      view_(make_view(comm_->geometry(), shape, check)),
      reach_(comm_, reach_plan(view_)) {
  arena_ = std::make_shared<Arena>(view_.node.arena, view_.node.arena + shape.arena_bytes,
                                   dispatch_bound(view_.geometry, shape));
  pool_ = std::make_shared<PlanPool>(view_);
  const uint64_t per_book = static_cast<uint64_t>(view_.geometry.nodes()) * shape.channels;
  book_counts_.assign(2 * per_book, 0);
  book_.rows = book_counts_.data();
  book_.back = book_counts_.data() + per_book;
}

void Buffer::begin_call(Verb verb, uint64_t bytes_moved) {
  comm_->begin_call(verb, reach_.number());
  reach_.begin(bytes_moved >= stream_threshold_);
  ++reach_.host().counters.calls;
}

bool Buffer::ask(const DispatchCall& call, DispatchArgs& a, Status& bad) {
  const balance::Choice& choice = *call.choice;
  const balance::Refusal refusal = balance::count_picks(call.ids64, call.tokens, view_.shape.top_k,
                                                        choice.replicas().experts, call.counted);
  if (refusal.code != 0) {
    bad = bad_pick(static_cast<BadInput>(refusal.code), refusal.token, refusal.id);
    a.refused = Why::picks;
    a.ids64 = nullptr;
    return false;
  }
  a.ids64 = call.slots;
  if (!choice.needs_all()) {
    choice.route(choice.solve(nullptr, ++turn_), {call.ids64, call.tokens, view_.shape.top_k, call.counted},
                 view_.geometry.rank, nullptr, call.slots);
    return false;
  }
  fill_asked(view_, call, asked_);
  a.asked = asked_.data();
  return true;
}

Status Buffer::choose(const DispatchCall& call) {
  const CallScope scope(comm_->calls(), "choose");
  if (!scope.entered()) return {Code::interrupted};
  DispatchArgs a;
  a.b = view_;
  a.book = &book_;
  a.plan.call = call.shape;
  a.refused = call.refused;
  Status bad;
  if (call.refused == Why::none && !ask(call, a, bad) && !call.choice->needs_all())
    return bad;  // each rank by itself
  begin_call(Verb::choose, 0);
  if (a.refused == Why::none) {
    Chooser chooser(view_, call, book_.counts);
    return reach_.run(true, [&](auto fabric) {
      return run_exchange(Lane{}, fabric, a, [&](auto picks_of) { chooser.choose(picks_of); });
    });
  }
  asked_.assign(size_t(view_.geometry.nodes()) * view_.count.ints, 0);
  a.asked = asked_.data();
  const Status s =
      reach_.run(true, [&](auto fabric) { return run_exchange(Lane{}, fabric, a, [](auto) {}); });
  return bad.ok() ? s : bad;
}

Status Buffer::dispatch(const DispatchCall& call, Plan& plan, std::shared_ptr<Block>& out,
                        std::shared_ptr<Block>& output) {
  const CallScope scope(comm_->calls(), "dispatch");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span recorded(recording_.get(), RecordedOp::dispatch, reach_.host().counters);
  Verdict verdict{};
  DispatchArgs a;
  a.b = view_;
  a.book = &book_;
  a.cached = call.cached;
  a.refused = call.refused;
  if (call.refused != Why::none) {
    plan.view.tokens = 0;
    plan.view.call = {};
  } else if (!call.cached) {
    plan.view.tokens = call.tokens;
    plan.view.call = call.shape;
    plan.owner = this;
  } else {
    plan.view.call.row_bytes = call.shape.row_bytes;
    plan.view.call.scale_bytes = call.shape.scale_bytes;
    plan.view.call.scales = call.shape.scales;
    plan.view.call.scales_by_column = call.shape.scales_by_column;
  }
  a.plan = plan.view;
  a.ids64 = call.ids64;
  a.ids32 = call.ids32;
  a.x = call.x;
  a.scales = call.scales;
  a.weights = call.weights;
  a.base = plan.base.data();
  a.first = plan.first.data();
  a.offers = plan.offers.data();
  a.target = plan.target.data();
  a.needed = plan.needed.data();
  a.verdict = &verdict;
  const uint64_t copies = std::min<uint64_t>(view_.shape.top_k, view_.geometry.size);
  begin_call(Verb::dispatch, call.shape.row_bytes * call.tokens * copies);
  const Offer offer = arena_->offer();
  Status s, bad;
  if (call.choice && !call.cached && call.refused == Why::none && ask(call, a, bad)) {
    Chooser chooser(view_, call, book_.dispatches);
    s = reach_.run(true, [&](auto fabric) { return run_dispatch(Lane{}, fabric, a, offer, chooser); });
  } else {
    if (!bad.ok()) a.plan.tokens = 0;
    s = reach_.run(true, [&](auto fabric) { return run_dispatch(Lane{}, fabric, a, offer); });
  }
  if (!bad.ok()) return bad;
  if (!s.ok()) return s;
  const int me = view_.geometry.local();
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
  const uint64_t rows = local_rows(plan);
  const uint64_t first = block_layout(rows, shape, view_.shape.top_k).bytes;
  arena_->expect(plan.needed[me]);
  out = std::make_shared<Block>(reach_.window(), arena_, plan.target[me].rows, first);
  output =
      std::make_shared<Block>(reach_.window(), arena_, plan.target[me].rows + first, plan.needed[me] - first);
  return s;
}

Status Buffer::refuse_combine(Why why) {
  const CallScope scope(comm_->calls(), "combine");
  if (!scope.entered()) return {Code::interrupted};
  CombineArgs a;
  std::vector<RowsBoard> boards(view_.geometry.ranks_per_node);
  a.b = view_;
  a.book = &book_;
  a.boards = boards.data();
  a.mine = {};
  a.refused = why;
  begin_call(Verb::combine, 0);
  return reach_.run(true, [&](auto fabric) { return run_combine(Lane{}, fabric, a); });
}

Status Buffer::combine(const CombineCall& call, Plan& plan, const Block& output) {
  const CallScope scope(comm_->calls(), "combine");
  if (!scope.entered()) return {Code::interrupted};
  Recording::Span recorded(recording_.get(), RecordedOp::combine, reach_.host().counters);
  const uint64_t rows = local_rows(plan);
  const OutputLayout l = output_layout(rows, view_.shape);
  CombineArgs a;
  std::vector<RowsBoard> boards(view_.geometry.ranks_per_node);
  a.b = view_;
  a.plan = plan.view;
  a.book = &book_;
  a.boards = boards.data();
  a.wire = call.wire;
  a.y = call.y;
  a.slots = call.slots;
  a.bias = call.bias;
  a.bias_stride = call.bias_stride;
  begin_call(Verb::combine, rows * view_.shape.combine_row_bytes());
  const Memory& window = *reach_.window();
  HostState& host = reach_.host();
  const auto offset_of = [&](const void* p) -> int64_t {
    const char* c = static_cast<const char*>(p);
    const bool inside = c >= window.data() && c < window.data() + window.bytes();
    return inside ? c - window.data() : -1;
  };
  int64_t at = offset_of(call.rows);
  if (at < 0) {
    at = output.offset() + l.rows;
    if (rows)
      (host.stream ? host.kernels->stream : host.kernels->copy)(window.data() + at, call.rows,
                                                                rows * view_.shape.combine_row_bytes());
    host.counters.staged_rows += rows;
  }
  a.mine.rows = {static_cast<uint64_t>(at)};
  const auto in_window = [&](const float* values, uint64_t count, Offset<float> staging) -> Offset<float> {
    if (!values) return {};
    if (const int64_t there = offset_of(values); there >= 0) return {static_cast<uint64_t>(there)};
    const Offset<float> at = staging.moved(output.offset());
    std::memcpy(window.data() + at.value, values, count * 4);
    return at;
  };
  const bool by_rank = plan.view.call.layout == RowLayout::rank;
  a.mine.sums = l.sums.moved(output.offset());
  a.mine.weights = in_window(call.weights, rows, l.weights);
  a.mine.back = in_window(call.back, rows * (by_rank ? view_.shape.top_k : 1), l.back);
  const Status s = reach_.run(true, [&](auto fabric) { return run_combine(Lane{}, fabric, a); });
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
  return reach_.host().counters;
}

Counters Buffer::take_counters() {
  std::lock_guard lock(comm_->calls());
  const Counters c = reach_.host().counters;
  reach_.host().counters = {};
  return c;
}

void Buffer::trace(bool on) {
  std::lock_guard lock(comm_->calls());
  reach_.trace(on);
}

void Buffer::record(std::shared_ptr<Recording> recording) {
  std::lock_guard lock(comm_->calls());
  recording_ = std::move(recording);
  reach_.host().timeline = recording_ ? &recording_->spans() : nullptr;
}

Recording::Segment Buffer::take(Recording& recording) {
  std::lock_guard lock(comm_->calls());
  return recording.take();
}

std::vector<RoleSpan> Buffer::take_timeline() {
  std::lock_guard lock(comm_->calls());
  return reach_.take_timeline();
}

}  // namespace moecomm
