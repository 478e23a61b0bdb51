#include "runtime/cuda/decode.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace moecomm::cuda {
namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

uint64_t DeviceDecode::bytes(const Geometry& g, const Shape& s) {
  return decode_window_layout(g, s).bytes + decode_region_layout(g, s).bytes;
}

DeviceDecode::DeviceDecode(Geometry geometry, Shape shape, bool check, int device,
                           std::shared_ptr<PeerAccess> peer_access, std::shared_ptr<DeviceCalls> calls,
                           Spread spread, double timeout_seconds)
    : view_(make_decode_view(geometry, shape, check)),
      device_(device),
      peer_access_(std::move(peer_access)),
      calls_(std::move(calls)),
      kernels_(peer_access_->decode_kernels()),
      spread_(spread),
      timeout_(timeout_seconds) {
  const OnDevice on(device);
  require(kernels_.prepare(), "loading the kernels (built for another architecture?)");
  window_ = peer_access_->window(bytes(geometry, shape), Peers::world);
  pinned_ = std::make_unique<Pinned>(sizeof(FaultRecord));
  const uint64_t table_bytes = place_decode_turn(view_, nullptr, turns_[0].view);
  const uint64_t size = geometry.size, p = geometry.ranks_per_node;
  detail::Cursor c;
  const auto barrier = c.take<uint64_t>(4);
  const auto clock = c.take<DecodeClock>(1);
  const auto windows = c.take<char*>(p), regions = c.take<char*>(size);
  const auto counters = c.take<Counters>(1);
  const auto mask = c.take<uint8_t>(size);
  const auto tables = c.take<char>(2 * table_bytes);
  const auto slice_counts = c.take<int32_t>(decode_scratch_ints(geometry, shape, spread.sms * spread.warps));
  state_ = DeviceMemory::create(device, c.at);
  char* s = state_->data();
  barrier_ = barrier.in(s);
  view_.mask = mask_ = mask.in(s);
  memory_ = {clock.in(s), tables.in(s), table_bytes, slice_counts.in(s)};
  links_.geometry = geometry;
  links_.windows = windows.in(s);
  links_.regions = regions.in(s);
  links_.rail_region = window_->data() + view_.window.bytes;
  links_.region_offset = view_.window.bytes;
  links_.window_faults = view_.window.faults;
  links_.region_faults = view_.region.faults;
  links_.region_peers = geometry.size;
  links_.own_peer = geometry.rank;
  links_.failed = barrier_ + 1;
  calls_->introduce(links_, refusals());
  links_.counters = counters.in(s);
}

void DeviceDecode::connect(const std::vector<std::string>& contacts) {
  const OnDevice on(device_);
  const Geometry& g = view_.geometry;
  window_->connect(g.rank, contacts);
  std::vector<char*> windows, regions;
  for (int d = 0; d < g.ranks_per_node; ++d) windows.push_back(window_->at(g.rank_at(g.node(), d)));
  for (int r = 0; r < g.size; ++r) {
    char* there = view_.same_node(r) ? nullptr : window_->at(r);
    regions.push_back(there ? there + view_.window.bytes : nullptr);
  }
  links_.network = window_->network();
  number_ = calls_->join();
  require(cudaMemcpy(links_.windows, windows.data(), 8 * windows.size(), cudaMemcpyHostToDevice),
          "writing the windows");
  require(cudaMemcpy(links_.regions, regions.data(), 8 * regions.size(), cudaMemcpyHostToDevice),
          "writing the regions");
}

// After a failure no epoch is open.
Status DeviceDecode::noted(const Status& s) {
  if (s.ok() || broken_) return s;
  broken_ = is_final(s);
  order_.drop();
  reset_barrier_ = true;
  return s;
}

Status DeviceDecode::fault() { return noted(calls_->fault(refusals())); }
Status DeviceDecode::ended() { return noted(calls_->late_fault(refusals(), true)); }
Status DeviceDecode::late_fault() { return noted(calls_->late_fault(refusals(), false)); }

DecodeStage DeviceDecode::stage(uint64_t epoch, void* stream) const {
  return order_.stage(epoch, capture_of(stream));
}

// begins: the launch begins a call; else it is the second phase of one. awaited: the host waits for the
// result.
Call DeviceDecode::begin(void* stream, Verb verb, bool begins, bool awaited) {
  if (reset_barrier_) require(cudaMemsetAsync(barrier_, 0, 8 * 4, as_stream(stream)), "opening a call");
  reset_barrier_ = false;
  Call call;
  call.links = links_;
  if (awaited) call.links.own = nullptr;
  call.spread = spread_;
  call.timeout_ns = static_cast<uint64_t>(timeout_ * 1e9);
  call.latches = barrier_;
  call.verb = verb;
  call.memory = number_;
  call.begins = begins;
  call.awaited = awaited;
  return call;
}

int DeviceDecode::squad(const DecodeTurn& t) const {
  return squad_of(spread_, std::max(t.tokens, view_.geometry.size));
}

// A launch that only waits for kernels that other ranks have already started need not start together with
// theirs.
Status DeviceDecode::start(void* stream, bool together, const std::function<void()>& launch) {
  if (together) return calls_->start_together(*window_, stream, timeout_, launch);
  launch();
  return {};
}

Status DeviceDecode::launch(const DecodeDispatchWork& work, void* stream) {
  MOE_TRY(start(stream, work.sends, [&] {
    const Call call = begin(stream, Verb::decode_dispatch, work.sends, work.args.refused != Why::none);
    require(kernels_.dispatch({call, squad(work.args.turn), work}, stream), "starting decode dispatch");
  }));
  if (work.sends) order_.sent();
  if (work.receives) order_.received(work.ticket, true, work.args.turn.refused());
  return {};
}

Status DeviceDecode::launch(const DecodeCombineWork& work, void* stream) {
  const bool awaited = work.args.refused != Why::none, again = work.answers && work.args.turn.combine > 0;
  if (again)
    MOE_TRY(start(stream, true, [&] {
      const Call call = begin(stream, Verb::decode_combine, true, awaited);
      require(kernels_.release({call, squad(work.args.turn), work}, stream), "starting decode combine");
    }));
  MOE_TRY(start(stream, work.answers, [&] {
    const Call call = begin(stream, Verb::decode_combine, work.answers && !again, awaited);
    require(kernels_.combine({call, squad(work.args.turn), work}, stream), "starting decode combine");
  }));
  if (work.answers) order_.answered(work.ticket, work.args.refused != Why::none);
  if (work.sums) order_.summed(work.ticket, true);
  return {};
}

Status DeviceDecode::dispatch(const DeviceDecodeDispatch& call) {
  const OnDevice on(device_);
  MOE_TRY(late_fault());
  const uint64_t capture = capture_of(call.stream);
  MOE_TRY(order_.enter(capture));
  MOE_TRY(order_.before_dispatch([&](uint64_t e) { return dispatch_receive(e, call.stream); },
                                 [&](uint64_t e) { return combine_receive(e, call.stream); }));
  order_.open(capture);
  DecodeTurn& t = turn(order_.next()).view;
  open_turn(t, view_, order_.next(), call);
  const bool refused = call.refused != Why::none;
  const DecodeDispatchWork work{.args = make_decode_send_args(view_, t, call),
                                .memory = memory_,
                                .ticket = t.epoch,
                                .sends = true,
                                .receives = call.receive || refused};
  MOE_TRY(launch(work, call.stream));
  return refused ? await_refusal(call.stream) : Status{};
}

// Waits for a call that this rank refuses. Returns only a final failure.
Status DeviceDecode::await_refusal(void* stream) {
  require(cudaStreamSynchronize(as_stream(stream)), "refusing a call");
  const Status s = fault();
  return is_final(s) ? s : Status{};
}

// A step from before a mask has no result.
Status DeviceDecode::before_mask(uint64_t epoch) const {
  return lost_ >= 0 && epoch <= before_mask_ ? Status{Code::lost, Phase::none, lost_} : Status{};
}

// The next epoch, because a dispatch that failed may already have sent some of its flags.
uint64_t DeviceDecode::rest() {
  const OnDevice on(device_);
  require(cudaDeviceSynchronize(), "waiting for the calls before a mask");
  DecodeClock clock;
  require(cudaMemcpy(&clock, memory_.clock, sizeof(clock), cudaMemcpyDeviceToHost), "reading the epoch");
  return clock.epoch + 1;
}

void DeviceDecode::mask(const std::vector<uint8_t>& masked, uint64_t latest, uint64_t calls) {
  const OnDevice on(device_);
  lost_ = static_cast<int>(std::find(masked.begin(), masked.end(), 1) - masked.begin());
  before_mask_ = order_.latest();
  const DecodeClock clock{.epoch = latest, .turn = {}};
  const Geometry& g = view_.geometry;
  require(cudaMemcpy(memory_.clock, &clock, sizeof(clock), cudaMemcpyHostToDevice), "moving the epoch");
  require(cudaMemcpy(mask_, masked.data(), masked.size(), cudaMemcpyHostToDevice), "writing the mask");
  require(cudaMemset(barrier_, 0, 8 * 4), "clearing what has failed");
  require(cudaMemset(view_.window.faults.in(window_->data()), 0, sizeof(FaultWord) * g.ranks_per_node),
          "clearing what has failed");
  require(
      cudaMemset(view_.region.faults.in(window_->data() + view_.window.bytes), 0, sizeof(FaultWord) * g.size),
      "clearing what has failed");
  require(cudaDeviceSynchronize(), "writing the mask");
  std::atomic_ref(refusals()->code).store(0, std::memory_order_release);
  order_.drop();
  reset_barrier_ = broken_ = false;
  calls_->continue_without(masked, calls);
}

Status DeviceDecode::dispatch_receive(uint64_t epoch, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(late_fault());
  MOE_TRY(before_mask(epoch));
  if (stage(epoch, stream) != DecodeStage::sent) return {};
  const DecodeTurn& t = turn(epoch).view;
  return launch(DecodeDispatchWork{.args = make_decode_send_args(view_, t, {}),
                                   .memory = memory_,
                                   .ticket = t.epoch,
                                   .sends = false,
                                   .receives = true},
                stream);
}

Status DeviceDecode::refuse_combine(uint64_t epoch, Why why, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(late_fault());
  if (stage(epoch, stream) == DecodeStage::sent) MOE_TRY(dispatch_receive(epoch, stream));
  if (!can_combine(stage(epoch, stream))) return {};
  DeviceDecodeCombine call;
  call.refused = why;
  call.receive = true;
  call.stream = stream;
  MOE_TRY(answer(turn(epoch), call));
  return await_refusal(stream);
}

Status DeviceDecode::combine(const DeviceDecodeCombine& call) {
  const OnDevice on(device_);
  MOE_TRY(late_fault());
  return answer(turn(call.epoch), call);
}

Status DeviceDecode::answer(Turn& t, const DeviceDecodeCombine& call) {
  t.answer = make_decode_answer(t.view, call);
  t.view.combine = order_.combines(t.view.epoch);
  char* own = rows(t.view.bank);
  const bool staged = !t.view.weighted && call.rows != own && call.refused == Why::none;
  return launch(
      DecodeCombineWork{.args = make_decode_combine_args(view_, t.view, t.answer, staged ? own : call.rows),
                        .memory = memory_,
                        .ticket = t.view.epoch,
                        .ids64 = call.ids64,
                        .ids32 = call.ids32,
                        .weights = call.weights,
                        .staged = staged ? call.rows : nullptr,
                        .answers = true,
                        .sums = call.receive},
      call.stream);
}

Status DeviceDecode::combine_receive(uint64_t epoch, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(late_fault());
  MOE_TRY(before_mask(epoch));
  if (stage(epoch, stream) != DecodeStage::answered) return {};
  const Turn& t = turn(epoch);
  return launch(DecodeCombineWork{.args = make_decode_combine_args(view_, t.view, t.answer, nullptr),
                                  .memory = memory_,
                                  .ticket = t.view.epoch,
                                  .ids64 = nullptr,
                                  .ids32 = nullptr,
                                  .weights = nullptr,
                                  .staged = nullptr,
                                  .answers = false,
                                  .sums = true},
                stream);
}

Counters DeviceDecode::take_counters() {
  const OnDevice on(device_);
  require(cudaDeviceSynchronize(), "reading counters");
  Counters c;
  require(cudaMemcpy(&c, links_.counters, sizeof(c), cudaMemcpyDeviceToHost), "reading counters");
  require(cudaMemset(links_.counters, 0, sizeof(c)), "resetting counters");
  return c;
}

}  // namespace moecomm::cuda
