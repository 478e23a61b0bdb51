#include "runtime/cuda/buffer.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

#include "session/arguments.hpp"
#include "session/staging.hpp"

namespace moecomm::cuda {
namespace {

constexpr size_t kUuid = 16;  // bytes of a GPU's UUID
cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

uint64_t DeviceBuffer::bytes(const Geometry& g, const Shape& s) {
  return node_layout(g, s).bytes + rail_layout(g, s).bytes;
}

DeviceBuffer::DeviceBuffer(Geometry geometry, Shape shape, bool check, int device,
                           std::shared_ptr<PeerAccess> peer_access, std::shared_ptr<DeviceCalls> calls,
                           Spread spread, double timeout_seconds)
    : view_(make_view(geometry, shape, check)),
      device_(device),
      peer_access_(std::move(peer_access)),
      calls_(std::move(calls)),
      kernels_(peer_access_->kernels()),
      spread_(spread),
      timeout_(timeout_seconds) {
  const OnDevice on(device);
  require(kernels_.prepare(), "loading the kernels (built for another architecture?)");
  window_ = peer_access_->window(bytes(geometry, shape));
  arena_ = std::make_shared<Arena>(view_.node.arena, view_.node.arena + shape.arena_bytes,
                                   dispatch_bound(view_.geometry, shape));
  pinned_ = std::make_unique<Pinned>(4096);

  const uint64_t n = geometry.nodes(), p = geometry.ranks_per_node, per_peer = n * shape.channels,
                 mask_words = (p + 63) / 64;
  detail::Cursor c;
  const auto latches = c.take<uint64_t>(kLatchWords + kFailedWords);
  const auto consumed = c.take<Consumed>(1);
  const auto rows = c.take<uint64_t>(per_peer), back = c.take<uint64_t>(per_peer);
  const auto windows = c.take<char*>(p), regions = c.take<char*>(n);
  const auto mask = c.take<uint64_t>(mask_words);
  const auto counters = c.take<Counters>(1);
  state_ = DeviceMemory::create(device, c.at);
  char* s = state_->data();
  latches_ = latches.in(s);
  consumed_ = consumed.in(s);
  Consumed first;
  first.rows = rows.in(s);
  first.back = back.in(s);
  require(cudaMemcpy(consumed_, &first, sizeof(first), cudaMemcpyHostToDevice), "writing the counts");
  links_.geometry = geometry;
  links_.windows = windows.in(s);
  links_.regions = regions.in(s);
  links_.same_device = mask.in(s);
  links_.rail_region = window_->data() + view_.node.bytes;
  links_.window_faults = view_.node.faults;
  links_.region_faults = view_.rail.faults;
  links_.region_peers = static_cast<int32_t>(n);
  links_.own_peer = geometry.node();
  links_.failed = latches_ + kLatchWords;
  calls_->introduce(links_, refusals());
  links_.counters = counters.in(s);
  pool_->idle.push_back(make_plan());  // in advance, because memory cannot be allocated during a capture
}

DeviceBuffer::~DeviceBuffer() = default;

std::string DeviceBuffer::contact() const {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, device_), "reading the GPU's UUID");
  static_assert(sizeof(properties.uuid) == kUuid);
  return std::string(properties.uuid.bytes, kUuid) + window_->contact();
}

void DeviceBuffer::connect(const std::vector<std::string>& contacts) {
  const OnDevice on(device_);
  const Geometry& g = view_.geometry;
  std::vector<std::string> gpus, keys;
  for (const std::string& contact : contacts) {
    gpus.push_back(contact.substr(0, kUuid));
    keys.push_back(contact.substr(kUuid));
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
  number_ = calls_->join();
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
  const auto channel_counts = c.take<int32_t>(view_.shape.channels * n * ints);
  const auto base = c.take<int32_t>(n * firsts), first = c.take<int32_t>(firsts);
  const auto offers = c.take<Offer>(p);
  const auto target = c.take<BlockLayout>(p);
  const auto needed = c.take<uint64_t>(p);
  const auto verdict = c.take<Verdict>(1);
  const auto boards = c.take<RowsBoard>(p);
  plan->memory = DeviceMemory::create(device_, c.at);
  char* m = plan->memory->data();
  place_plan(view_, view.in(m), plan->view);
  plan->channel_counts = channel_counts.in(m);
  plan->scratch = {base.in(m), first.in(m), offers.in(m), target.in(m), needed.in(m), verdict.in(m)};
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

// Begins a call. awaited: the host waits for its result.
Call DeviceBuffer::begin(Verb verb, bool awaited) {
  ++made_;
  Call call;
  call.links = links_;
  if (awaited) call.links.own = nullptr;
  call.spread = spread_;
  call.timeout_ns = static_cast<uint64_t>(timeout_ * 1e9);
  call.latches = latches_;
  call.verb = verb;
  call.memory = number_;
  call.begins = true;
  call.awaited = awaited;
  return call;
}

// Starts a kernel together with all other ranks.
Status DeviceBuffer::start(void* stream, const std::function<void()>& launch) {
  return calls_->start_together(*window_, stream, timeout_, launch);
}

Status DeviceBuffer::wait_placed(uint64_t ticket, void* stream) {
  std::atomic_ref ready(placed().ticket);
  // The kernel has its own deadline; this one is for a kernel that never starts.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(2 * timeout_ + 1);
  while (ready.load(std::memory_order_acquire) != ticket) {
    std::this_thread::yield();  // the loop also calls the driver, which other ranks' threads need
    if (const Status s = fault(); !s.ok()) return s;
    const cudaError_t e = cudaStreamQuery(as_stream(stream));
    if (e != cudaErrorNotReady && e != cudaSuccess) require(e, "dispatch");
    if (std::chrono::steady_clock::now() >= deadline)
      return calls_->break_with({Code::timeout, Phase::counts, -1, 0, ticket, ready.load()});
  }
  if (placed().verdict == Code::ok) return {};
  // Every rank completes a refused call.
  require(cudaStreamSynchronize(as_stream(stream)), "dispatch");
  return fault();
}

Status DeviceBuffer::dispatch(const DeviceDispatchCall& call, const std::shared_ptr<DevicePlan>& owned,
                              std::shared_ptr<DeviceBlock>& out, std::shared_ptr<DeviceBlock>& output) {
  DevicePlan& plan = *owned;
  const OnDevice on(device_);
  if (const Status s = late_fault(); !s.ok()) return s;
  open_plan(plan.view, call);
  const Offer offer = arena_->offer();
  const DispatchWork work{make_dispatch_args(view_, plan.view, consumed_, plan.scratch, call, nullptr), offer,
                          plan.channel_counts};
  const CallShape& shape = plan.view.call;
  const bool refused = call.refused != Why::none, known = shape.capacity >= 0 || call.cached || refused;
  const uint64_t ticket = known ? 0 : ++ticket_;
  MOE_TRY(start(call.stream, [&] {
    const DispatchLaunch launch{begin(Verb::dispatch, !known || refused), work, known ? nullptr : &placed(),
                                ticket};
    require(kernels_.dispatch(launch, call.stream), "starting dispatch");
  }));

  if (refused) return await_refusal(call.refused, call.stream);
  int64_t rows = call.cached ? plan.num_rows : shape.capacity;
  if (!known) {
    if (const Status s = wait_placed(ticket, call.stream); !s.ok()) return s;
    rows = placed().rows;
  }
  const Piece piece = piece_of(view_, shape, rows, offer);
  if (!piece.fits()) {  // all ranks have refused the call
    require(cudaStreamSynchronize(as_stream(call.stream)), "dispatch");
    const Status s = fault();
    return s.ok()
               ? Status{Code::capacity, Phase::counts, view_.geometry.rank, 0, piece.bytes, piece.available}
               : s;
  }
  plan.num_rows = rows;
  const HeldPiece held = hold(window_, arena_, piece);
  out = held.block;
  output = held.output;
  if (capture_of(call.stream)) captured_.keep(owned, {out, output});
  return {};
}

// Waits for a call that this rank refuses. The caller knows this rank's own refusal, so only a final failure
// is reported; if the rank needs larger memory, also the permanent refusal of another rank.
Status DeviceBuffer::await_refusal(Why why, void* stream) {
  require(cudaStreamSynchronize(as_stream(stream)), "refusing a call");
  const Status s = fault();
  return is_final(s) || why == Why::grow ? s : Status{};
}

Status DeviceBuffer::refuse_combine(Why why, DevicePlan& plan, void* stream) {
  const OnDevice on(device_);
  if (const Status s = late_fault(); !s.ok()) return s;
  const CombineArgs a = make_refused_combine_args(view_, consumed_, plan.boards, why);
  MOE_TRY(start(stream, [&] {
    require(kernels_.combine({begin(Verb::combine, true), a}, stream), "refusing combine");
  }));
  return await_refusal(why, stream);
}

Status DeviceBuffer::combine(const DeviceCombineCall& call, const std::shared_ptr<DevicePlan>& owned,
                             const std::shared_ptr<DeviceBlock>& owned_output) {
  const DevicePlan& plan = *owned;
  const DeviceBlock& output = *owned_output;
  const OnDevice on(device_);
  if (const Status s = late_fault(); !s.ok()) return s;
  const uint64_t rows = plan.num_rows;
  const auto stage = [&](uint64_t at, const void* from, uint64_t bytes) {
    require(
        cudaMemcpyAsync(window_->data() + at, from, bytes, cudaMemcpyDeviceToDevice, as_stream(call.stream)),
        "staging rows");
  };
  const RowsBoard board = place_rows(
      view_, plan.view.call, call, window_->data(), output.offset(), rows,
      [&](uint64_t at, const char* from, uint64_t bytes) {
        stage(at, from, bytes);
        staged_rows_ += rows;
      },
      [&](uint64_t at, const float* from, uint64_t count) { stage(at, from, count * 4); });
  const CombineArgs a = make_combine_args(view_, plan.view, consumed_, plan.boards, board, call);
  if (capture_of(call.stream)) captured_.keep(owned, {owned_output});
  return start(call.stream, [&] {
    require(kernels_.combine({begin(Verb::combine, false), a}, call.stream), "starting combine");
  });
}

Counters DeviceBuffer::take_counters() {
  const OnDevice on(device_);
  require(cudaDeviceSynchronize(), "reading counters");
  Counters c;
  require(cudaMemcpy(&c, links_.counters, sizeof(c), cudaMemcpyDeviceToHost), "reading counters");
  require(cudaMemset(links_.counters, 0, sizeof(c)), "resetting counters");
  c.calls += std::exchange(made_, 0);
  c.staged_rows += std::exchange(staged_rows_, 0);
  return c;
}

}  // namespace moecomm::cuda
