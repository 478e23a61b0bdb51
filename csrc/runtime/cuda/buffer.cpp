#include "runtime/cuda/buffer.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

namespace moecomm::cuda {
namespace {

constexpr int kGates = static_cast<int>(Gate::count);
constexpr size_t kUuid = 16;  // bytes of a GPU's name
cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

uint64_t DeviceBuffer::bytes(const Geometry& g, const Shape& s) {
  return node_layout(g, s).bytes + rail_layout(g, s).bytes;
}

DeviceBuffer::DeviceBuffer(Geometry geometry, Shape shape, bool check, int device,
                           std::shared_ptr<DeviceReach> reach, Spread spread, double timeout_seconds)
    : view_(make_view(geometry, shape, check)),
      device_(device),
      reach_(std::move(reach)),
      kernels_(reach_->kernels()),
      spread_(spread),
      timeout_(timeout_seconds) {
  const OnDevice on(device);
  require(kernels_.prepare(), "loading the kernels (built for another architecture?)");
  window_ = reach_->window(bytes(geometry, shape));
  arena_ = std::make_shared<Arena>(view_.node.arena, view_.node.arena + shape.arena_bytes,
                                   dispatch_bound(view_.geometry, shape));
  pinned_ = std::make_unique<Pinned>(4096);

  const uint64_t n = geometry.nodes(), p = geometry.ranks_per_node, per_book = n * shape.channels,
                 mask_words = (p + 63) / 64;
  detail::Cursor c;
  const auto gates = c.take<uint64_t>(kGates + 3);
  const auto book = c.take<Book>(1);
  const auto rows = c.take<uint64_t>(per_book), back = c.take<uint64_t>(per_book);
  const auto windows = c.take<char*>(p), regions = c.take<char*>(n);
  const auto mask = c.take<uint64_t>(mask_words);
  const auto counters = c.take<Counters>(1);
  state_ = DeviceMemory::create(device, c.at);
  char* s = state_->data();
  gates_ = gates.in(s);
  book_ = book.in(s);
  Book first;
  first.rows = rows.in(s);
  first.back = back.in(s);
  require(cudaMemcpy(book_, &first, sizeof(first), cudaMemcpyHostToDevice), "writing the book");
  links_.geometry = geometry;
  links_.windows = windows.in(s);
  links_.regions = regions.in(s);
  links_.same_device = mask.in(s);
  links_.rail_region = window_->data() + view_.node.bytes;
  links_.window_faults = view_.node.faults;
  links_.region_faults = view_.rail.faults;
  links_.region_peers = static_cast<int32_t>(n);
  links_.own_peer = geometry.node();
  links_.failed = gates_ + kGates;
  links_.faults = records();
  links_.counters = counters.in(s);
  pool_->idle.push_back(make_plan());  // ahead, since a stream that is being captured allows no allocation
}

DeviceBuffer::~DeviceBuffer() = default;

std::string DeviceBuffer::card() const {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, device_), "asking for the GPU's identity");
  static_assert(sizeof(properties.uuid) == kUuid);
  return std::string(properties.uuid.bytes, kUuid) + window_->card();
}

void DeviceBuffer::connect(const std::vector<std::string>& cards) {
  const OnDevice on(device_);
  const Geometry& g = view_.geometry;
  std::vector<std::string> gpus, keys;
  for (const std::string& card : cards) {
    gpus.push_back(card.substr(0, kUuid));
    keys.push_back(card.substr(kUuid));
  }
  window_->connect(g.rank, keys);
  std::vector<char*> windows, regions;
  std::vector<uint64_t> mask((g.ranks_per_node + 63) / 64);
  for (int d = 0; d < g.ranks_per_node; ++d) {
    const int rank = g.rank_at(g.node(), d);
    windows.push_back(window_->at(rank));
    if (gpus[rank] == gpus[g.rank]) mask[d / 64] |= uint64_t{1} << d % 64;
  }
  for (int n = 0; n < g.nodes(); ++n) {
    char* there = window_->at(g.rail_rank(n));
    regions.push_back(there ? there + view_.node.bytes : nullptr);
  }
  links_.network = window_->network();
  links_.region_offset = view_.node.bytes;
  require(cudaMemcpy(links_.windows, windows.data(), 8 * windows.size(), cudaMemcpyHostToDevice),
          "writing the windows");
  require(cudaMemcpy(links_.regions, regions.data(), 8 * regions.size(), cudaMemcpyHostToDevice),
          "writing the regions");
  require(cudaMemcpy(links_.same_device, mask.data(), 8 * mask.size(), cudaMemcpyHostToDevice),
          "writing the peers' GPUs");
}

std::unique_ptr<DevicePlan> DeviceBuffer::make_plan() {
  const uint64_t n = view_.geometry.nodes(), p = view_.geometry.ranks_per_node, ints = view_.count.ints;
  const uint64_t firsts = std::max<uint64_t>(view_.experts_per_node(), p);
  auto plan = std::make_unique<DevicePlan>();
  detail::Cursor c;
  const auto view = c.take<char>(place_plan(view_, nullptr, plan->view));
  const auto apart = c.take<int32_t>(view_.shape.channels * n * ints);
  const auto base = c.take<int32_t>(n * firsts), first = c.take<int32_t>(firsts);
  const auto offers = c.take<Offer>(p);
  const auto target = c.take<BlockLayout>(p);
  const auto needed = c.take<uint64_t>(p);
  const auto verdict = c.take<Verdict>(1);
  const auto boards = c.take<RowsBoard>(p);
  plan->memory = DeviceMemory::create(device_, c.at);
  char* m = plan->memory->data();
  place_plan(view_, view.in(m), plan->view);
  plan->apart = apart.in(m);
  plan->base = base.in(m);
  plan->first = first.in(m);
  plan->offers = offers.in(m);
  plan->target = target.in(m);
  plan->needed = needed.in(m);
  plan->verdict = verdict.in(m);
  plan->boards = boards.in(m);
  plan->owner = this;
  return plan;
}

std::shared_ptr<DevicePlan> DeviceBuffer::new_plan() {
  std::unique_ptr<DevicePlan> plan;
  {
    std::lock_guard lock(pool_->mutex);
    if (!pool_->idle.empty()) {
      plan = std::move(pool_->idle.back());
      pool_->idle.pop_back();
    }
  }
  if (!plan) plan = make_plan();
  return std::shared_ptr<DevicePlan>(plan.release(), [pool = std::weak_ptr(pool_)](DevicePlan* p) {
    std::unique_ptr<DevicePlan> owned(p);
    if (const auto home = pool.lock()) {
      std::lock_guard lock(home->mutex);
      home->idle.push_back(std::move(owned));
    }
  });
}

Call DeviceBuffer::begin(void* stream) {
  require(cudaMemsetAsync(gates_, 0, 8 * (kGates + 3), as_stream(stream)), "opening a call");
  ++calls_;
  Call call;
  call.links = links_;
  call.spread = spread_;
  call.timeout_ns = static_cast<uint64_t>(timeout_ * 1e9);
  call.gates = gates_;
  return call;
}

Status DeviceBuffer::fault() {
  const bool sound = broken_.ok();
  const Status s = take_fault(records(), broken_);
  if (sound && !broken_.ok()) window_->leave();
  return s;
}

// Of calls for which no host has waited: a refusal that is found so late, or a mismatch of combines, leaves
// the ranks out of step. Those that have gone on are told, since they may wait for this one.
Status DeviceBuffer::late_fault(void* stream) {
  const Status s = fault();
  const bool refused = s.code == Code::refused;
  if (!refused && !ends_late(s)) return s;
  window_->leave();
  broken_ = refused ? refused_late(s) : s;
  const Geometry& g = view_.geometry;
  for (int r = 0; r < g.size && refused; ++r) {
    if (r == g.rank || (r / g.ranks_per_node != g.node() && r % g.ranks_per_node != g.local())) continue;
    const bool near = r / g.ranks_per_node == g.node();
    window_->tell(r,
                  near ? (view_.node.faults + g.local()).value
                       : view_.node.bytes + (view_.rail.faults + g.node()).value,
                  pack_fault(broken_, g.rank), stream);
  }
  return broken_;
}

Status DeviceBuffer::wait_placed(uint64_t ticket, void* stream) {
  auto& ready = *reinterpret_cast<std::atomic<uint64_t>*>(&placed().ticket);
  // The kernel has its own deadline; this one is for a kernel that never starts.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(2 * timeout_ + 1);
  while (ready.load(std::memory_order_acquire) != ticket) {
    std::this_thread::yield();  // the driver is asked, too, and other ranks' threads want it
    if (const Status s = fault(); !s.ok()) return s;
    const cudaError_t e = cudaStreamQuery(as_stream(stream));
    if (e != cudaErrorNotReady && e != cudaSuccess) require(e, "dispatch");
    if (std::chrono::steady_clock::now() >= deadline)
      return broken_ = {Code::timeout, Phase::counts, -1, 0, ticket, ready.load()};
  }
  if (placed().verdict == 0) return {};
  require(cudaStreamSynchronize(as_stream(stream)),
          "dispatch");  // every rank finishes the call before it refuses it
  return fault();
}

Status DeviceBuffer::dispatch(const DeviceDispatchCall& call, const std::shared_ptr<DevicePlan>& owned,
                              std::shared_ptr<DeviceBlock>& out, std::shared_ptr<DeviceBlock>& output) {
  DevicePlan& plan = *owned;
  const OnDevice on(device_);
  if (const Status s = late_fault(call.stream); !s.ok()) return s;
  if (call.refused != Why::none) {
    plan.view.tokens = 0;
    plan.view.call = {};
  } else if (!call.cached) {
    plan.view.tokens = call.tokens;
    plan.view.call = call.shape;
  } else {
    plan.view.call.row_bytes = call.shape.row_bytes;
    plan.view.call.scale_bytes = call.shape.scale_bytes;
    plan.view.call.scales = call.shape.scales;
    plan.view.call.scales_by_column = call.shape.scales_by_column;
  }
  DispatchLaunch launch;
  DispatchArgs& a = launch.work.args;
  a.b = view_;
  a.plan = plan.view;
  a.book = book_;
  a.cached = call.cached;
  a.refused = call.refused;
  a.ids64 = call.ids64;
  a.ids32 = call.ids32;
  a.x = call.x;
  a.scales = call.scales;
  a.weights = call.weights;
  a.base = plan.base;
  a.first = plan.first;
  a.offers = plan.offers;
  a.target = plan.target;
  a.needed = plan.needed;
  a.verdict = plan.verdict;
  launch.work.apart = plan.apart;
  launch.work.offer = arena_->offer();
  const CallShape& shape = plan.view.call;
  const bool known = shape.capacity >= 0 || call.cached || call.refused != Why::none;
  if (!known) {
    launch.placed = &placed();
    launch.ticket = ++ticket_;
  }
  MOE_TRY(window_->start_together(call.stream, timeout_, [&] {
    launch.call = begin(call.stream);
    require(kernels_.dispatch(launch, call.stream), "starting dispatch");
  }));

  if (call.refused != Why::none) return settled(call.stream);
  int64_t rows = call.cached ? plan.num_rows : shape.capacity;
  if (!known) {
    if (const Status s = wait_placed(launch.ticket, call.stream); !s.ok()) return s;
    rows = placed().rows;
  }
  // The rule by which every gateway of the node chooses the piece (place).
  const uint64_t first = block_layout(rows, shape, view_.shape.top_k).bytes,
                 needed = first + output_layout(rows, view_.shape).bytes;
  const int piece = needed <= launch.work.offer.bytes[0] ? 0 : 1;
  if (needed > launch.work.offer.bytes[piece]) {  // all ranks have refused the call by then
    require(cudaStreamSynchronize(as_stream(call.stream)), "dispatch");
    const Status s = fault();
    return s.ok() ? Status{Code::capacity,
                           Phase::counts,
                           view_.geometry.rank,
                           0,
                           needed,
                           launch.work.offer.bytes[piece]}
                  : s;
  }
  plan.num_rows = rows;
  arena_->expect(needed);
  const uint64_t offset = launch.work.offer.offset[piece];
  out = std::make_shared<DeviceBlock>(window_, arena_, offset, first);
  output = std::make_shared<DeviceBlock>(window_, arena_, offset + first, needed - first);
  if (capture_of(call.stream)) captured_.keep(owned, {out, output});
  return {};
}

// The end of a call that this rank refuses: what it says of itself is nothing new.
Status DeviceBuffer::settled(void* stream) {
  require(cudaStreamSynchronize(as_stream(stream)), "refusing a call");
  const Status s = fault();
  return is_final(s) ? s : Status{};
}

Status DeviceBuffer::refuse_combine(Why why, DevicePlan& plan, void* stream) {
  const OnDevice on(device_);
  if (const Status s = late_fault(stream); !s.ok()) return s;
  CombineLaunch launch;
  CombineArgs& a = launch.args;
  a.b = view_;
  a.plan = plan.view;
  a.book = book_;
  a.boards = plan.boards;
  a.mine = {};
  a.refused = why;
  MOE_TRY(window_->start_together(stream, timeout_, [&] {
    launch.call = begin(stream);
    require(kernels_.combine(launch, stream), "refusing combine");
  }));
  return settled(stream);
}

Status DeviceBuffer::combine(const DeviceCombineCall& call, const std::shared_ptr<DevicePlan>& owned,
                             const std::shared_ptr<DeviceBlock>& owned_output) {
  const DevicePlan& plan = *owned;
  const DeviceBlock& output = *owned_output;
  const OnDevice on(device_);
  if (const Status s = late_fault(call.stream); !s.ok()) return s;
  const uint64_t rows = plan.num_rows;
  const OutputLayout l = output_layout(rows, view_.shape);
  // In the window already, or staged there once.
  const auto in_window = [&](const void* p, uint64_t bytes, uint64_t staging) -> uint64_t {
    if (!p) return 0;
    const char* c = static_cast<const char*>(p);
    if (c >= window_->data() && c < window_->data() + view_.node.bytes) return c - window_->data();
    const uint64_t at = output.offset() + staging;
    if (bytes)
      require(
          cudaMemcpyAsync(window_->data() + at, p, bytes, cudaMemcpyDeviceToDevice, as_stream(call.stream)),
          "staging rows");
    return at;
  };
  CombineLaunch launch;
  CombineArgs& a = launch.args;
  a.b = view_;
  a.plan = plan.view;
  a.book = book_;
  a.boards = plan.boards;
  a.wire = call.wire;
  a.y = call.y;
  a.slots = call.slots;
  a.bias = call.bias;
  a.bias_stride = call.bias_stride;
  const uint64_t per_row = plan.view.call.layout == RowLayout::rank ? view_.shape.top_k : 1;
  a.mine.rows = {rows ? in_window(call.rows, rows * view_.shape.combine_row_bytes(), l.rows)
                      : output.offset()};
  if (rows && a.mine.rows == output.offset() + l.rows && call.rows != window_->data() + a.mine.rows)
    staged_rows_ += rows;
  a.mine.sums = l.sums.moved(output.offset());
  a.mine.weights = {in_window(call.weights, rows * 4, l.weights.value)};
  a.mine.back = {in_window(call.back, rows * 4 * per_row, l.back.value)};
  if (capture_of(call.stream)) captured_.keep(owned, {owned_output});
  return window_->start_together(call.stream, timeout_, [&] {
    launch.call = begin(call.stream);
    require(kernels_.combine(launch, call.stream), "starting combine");
  });
}

Counters DeviceBuffer::take_counters() {
  const OnDevice on(device_);
  require(cudaDeviceSynchronize(), "reading counters");
  Counters c;
  require(cudaMemcpy(&c, links_.counters, sizeof(c), cudaMemcpyDeviceToHost), "reading counters");
  require(cudaMemset(links_.counters, 0, sizeof(c)), "resetting counters");
  c.calls += std::exchange(calls_, 0);
  c.staged_rows += std::exchange(staged_rows_, 0);
  return c;
}

}  // namespace moecomm::cuda
