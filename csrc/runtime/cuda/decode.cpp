#include "runtime/cuda/decode.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace moecomm::cuda {
namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// What must be equal on all ranks, as the mode bits of a flag: how rows are coded, and whether weights
// travel.
int mode_of(int code, bool weighted) { return code | (weighted ? 4 : 0); }

}  // namespace

uint64_t DeviceDecode::bytes(const Geometry& g, const Shape& s) {
  return decode_window_layout(g, s).bytes + decode_region_layout(g, s).bytes;
}

DeviceDecode::DeviceDecode(Geometry geometry, Shape shape, bool check, int device,
                           std::shared_ptr<DeviceReach> reach, Spread spread, double timeout_seconds)
    : view_(make_decode_view(geometry, shape, check)),
      device_(device),
      reach_(std::move(reach)),
      kernels_(reach_->decode_kernels()),
      spread_(spread),
      timeout_(timeout_seconds) {
  const OnDevice on(device);
  require(kernels_.prepare(), "loading the kernels (built for another architecture?)");
  window_ = reach_->window(bytes(geometry, shape), Peers::world);
  pinned_ = std::make_unique<Pinned>(kFaultRecords * sizeof(FaultRecord));
  table_bytes_ = place_decode_turn(view_, nullptr, turns_[0].view);
  const uint64_t size = geometry.size, p = geometry.ranks_per_node;
  detail::Cursor c;
  const auto met = c.take<uint64_t>(4);
  const auto clock = c.take<DecodeClock>(1);
  const auto windows = c.take<char*>(p), regions = c.take<char*>(size);
  const auto counters = c.take<Counters>(1);
  const auto tables = c.take<char>(2 * table_bytes_);
  const auto apart = c.take<int32_t>(decode_scratch_ints(geometry, shape, spread.sms * spread.warps));
  state_ = DeviceMemory::create(device, c.at);
  char* s = state_->data();
  met_ = met.in(s);
  clock_ = clock.in(s);
  tables_ = tables.in(s);
  apart_ = apart.in(s);
  links_.geometry = geometry;
  links_.windows = windows.in(s);
  links_.regions = regions.in(s);
  links_.rail_region = window_->data() + view_.window.bytes;
  links_.region_offset = view_.window.bytes;
  links_.window_faults = view_.window.faults;
  links_.region_faults = view_.region.faults;
  links_.region_peers = geometry.size;
  links_.own_peer = geometry.rank;
  links_.failed = met_ + 1;
  links_.faults = records();
  links_.counters = counters.in(s);
}

void DeviceDecode::connect(const std::vector<std::string>& cards) {
  const OnDevice on(device_);
  const Geometry& g = view_.geometry;
  window_->connect(g.rank, cards);
  std::vector<char*> windows, regions;
  for (int d = 0; d < g.ranks_per_node; ++d) windows.push_back(window_->at(g.rank_at(g.node(), d)));
  for (int r = 0; r < g.size; ++r) {
    char* there = view_.near(r) ? nullptr : window_->at(r);
    regions.push_back(there ? there + view_.window.bytes : nullptr);
  }
  links_.network = window_->network();
  require(cudaMemcpy(links_.windows, windows.data(), 8 * windows.size(), cudaMemcpyHostToDevice),
          "writing the windows");
  require(cudaMemcpy(links_.regions, regions.data(), 8 * regions.size(), cudaMemcpyHostToDevice),
          "writing the regions");
}

Status DeviceDecode::fault() {
  const bool sound = broken_.ok();
  const Status s = take_fault(records(), broken_);
  if (s.ok() || !sound) return s;
  if (!broken_.ok()) window_->leave();
  for (Turn& t : turns_) t.stage = DecodeStage::idle;
  unclean_ = true;
  return s;
}

// As DeviceBuffer::late_fault.
Status DeviceDecode::late_fault(void* stream) {
  Status s = fault();
  if (s.code != Code::refused) return s;
  s = refused_late(s);
  const Geometry& g = view_.geometry;
  for (int r = 0; r < g.size; ++r)
    if (r != g.rank)
      window_->tell(r,
                    view_.near(r) ? (view_.window.faults + g.local()).value
                                  : view_.window.bytes + (view_.region.faults + g.rank).value,
                    pack_fault(s, g.rank), stream);
  window_->leave();
  return broken_ = s;
}

DecodeStage DeviceDecode::stage(uint64_t epoch, void* stream) const {
  const Turn& t = turns_[epoch & 1];
  return t.epoch == epoch && t.capture == capture_of(stream) ? t.stage : DecodeStage::idle;
}

Call DeviceDecode::begin(void* stream) {
  if (unclean_) require(cudaMemsetAsync(met_, 0, 8 * 4, as_stream(stream)), "opening a call");
  unclean_ = false;
  Call call;
  call.links = links_;
  call.spread = spread_;
  call.timeout_ns = static_cast<uint64_t>(timeout_ * 1e9);
  call.gates = met_;
  return call;
}

int DeviceDecode::squad(const Turn& t) const {
  return squad_of(spread_, std::max(t.view.tokens, view_.geometry.size));
}

Status DeviceDecode::launch(Turn& t, DecodeDispatchWork work, void* stream) {
  work.args.d = view_;
  work.args.turn = t.view;
  work.ticket = t.epoch;
  work.clock = clock_;
  work.tables = tables_;
  work.table_bytes = table_bytes_;
  work.apart = apart_;
  const auto start = [&] {
    require(kernels_.dispatch({begin(stream), squad(t), work}, stream), "starting decode dispatch");
  };
  if (work.sends)
    MOE_TRY(window_->start_together(stream, timeout_, start));
  else
    start();  // waits for what others have started
  t.stage = work.receives ? DecodeStage::received : DecodeStage::sent;
  return {};
}

Status DeviceDecode::launch(Turn& t, DecodeCombineWork work, void* stream) {
  work.args.d = view_;
  work.args.turn = t.view;
  work.args.mode = t.combine_mode;
  work.args.wire = t.wire;
  work.args.y = t.y;
  work.ticket = t.epoch;
  work.clock = clock_;
  work.tables = tables_;
  work.table_bytes = table_bytes_;
  const auto start = [&] {
    require(kernels_.combine({begin(stream), squad(t), work}, stream), "starting decode combine");
  };
  if (work.answers)
    MOE_TRY(window_->start_together(stream, timeout_, start));
  else
    start();
  t.stage = work.sums ? DecodeStage::done : DecodeStage::answered;
  return {};
}

Status DeviceDecode::dispatch(const DeviceDecodeDispatch& call) {
  const OnDevice on(device_);
  MOE_TRY(late_fault(call.stream));
  const uint64_t capture = capture_of(call.stream);
  for (Turn& t : turns_) {
    if (t.capture == capture) continue;
    // Its kernels are not in this graph; what an earlier capture left open is that graph's own fault.
    if (t.capture == 0 && (t.stage == DecodeStage::sent || t.stage == DecodeStage::answered))
      return detail::out_of_turn(t.stage == DecodeStage::sent ? DecodeStage::received : DecodeStage::done,
                                 t.stage);
    t.stage = DecodeStage::idle;
  }
  if (Turn& last = turn(epoch_); last.stage == DecodeStage::sent)
    MOE_TRY(dispatch_receive(last.epoch, call.stream));  // rule A
  Turn& t = turn(epoch_ + 1);
  if (t.stage == DecodeStage::answered) MOE_TRY(combine_receive(t.epoch, call.stream));  // rule B
  t.epoch = ++epoch_;
  t.capture = capture;
  t.view.bank = static_cast<int32_t>(epoch_ & 1);
  t.view.tokens = call.refused == Why::none ? call.tokens : 0;
  t.view.weighted = call.weighted;
  t.view.mode =
      call.refused == Why::none ? mode_of(static_cast<int>(call.quant), call.weighted) : kRefusedMode;
  t.view.call.scales = call.quant;
  t.view.call.scales_by_column = call.scales_by_column;
  t.view.call.row_bytes =
      call.quant == ScaleKind::none ? view_.shape.combine_row_bytes() : view_.shape.hidden;
  t.view.call.scale_bytes = 4 * scale_words(view_.shape.hidden, call.quant);
  DecodeDispatchWork work;
  work.args.ids64 = call.ids64;
  work.args.ids32 = call.ids32;
  work.args.x = call.x;
  work.args.scales = call.scales;
  work.args.weights = call.weights;
  work.args.refused = call.refused;
  work.receives = call.receive;
  if (call.refused == Why::none) return launch(t, work, call.stream);
  work.receives = true;
  MOE_TRY(launch(t, work, call.stream));
  t.stage = DecodeStage::done;
  return settled(call.stream);
}

// The end of a call that this rank refuses.
Status DeviceDecode::settled(void* stream) {
  require(cudaStreamSynchronize(as_stream(stream)), "refusing a call");
  const Status s = fault();
  return is_final(s) ? s : Status{};
}

Status DeviceDecode::dispatch_receive(uint64_t epoch, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(late_fault(stream));
  if (stage(epoch, stream) != DecodeStage::sent) return {};
  DecodeDispatchWork work;
  work.sends = false;
  return launch(turn(epoch), work, stream);
}

Status DeviceDecode::refuse_combine(uint64_t epoch, Why why, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(late_fault(stream));
  if (stage(epoch, stream) == DecodeStage::sent) MOE_TRY(dispatch_receive(epoch, stream));
  if (stage(epoch, stream) != DecodeStage::received) return {};
  DecodeCombineWork work;
  work.args.refused = why;
  MOE_TRY(launch(turn(epoch), work, stream));
  return settled(stream);
}

Status DeviceDecode::combine(const DeviceDecodeCombine& call) {
  const OnDevice on(device_);
  MOE_TRY(late_fault(call.stream));
  Turn& t = turn(call.epoch);
  t.combine_mode = mode_of(static_cast<int>(call.wire), t.view.weighted);
  t.wire = call.wire;
  t.y = call.y;
  DecodeCombineWork work;
  char* own = rows(t.view.bank);
  work.staged = !t.view.weighted && call.rows != own ? call.rows : nullptr;
  work.args.rows = work.staged ? own : call.rows;
  work.ids64 = call.ids64;
  work.ids32 = call.ids32;
  work.weights = call.weights;
  work.sums = call.receive;
  return launch(t, work, call.stream);
}

Status DeviceDecode::combine_receive(uint64_t epoch, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(late_fault(stream));
  if (stage(epoch, stream) != DecodeStage::answered) return {};
  DecodeCombineWork work;
  work.answers = false;
  return launch(turn(epoch), work, stream);
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
