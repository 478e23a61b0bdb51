#include "runtime/cuda/domain.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace moecomm::cuda {
namespace {

constexpr uint64_t kWhole = ~uint64_t{0};
constexpr uint64_t kRoom = 64 << 10;  // its initial size
// A read of at most this many pieces goes by the copy engine and takes no multiprocessor, if it can.
constexpr size_t kCopies = 4;
cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

DeviceDomain::DeviceDomain(Geometry geometry, DomainShape shape, int device,
                           std::shared_ptr<PeerAccess> peer_access, std::shared_ptr<DeviceCalls> calls,
                           Spread spread, double timeout_seconds)
    : view_(make_domain_view(geometry, shape)),
      device_(device),
      peer_access_(std::move(peer_access)),
      calls_(std::move(calls)),
      kernels_(peer_access_->domain_kernels()),
      spread_(spread),
      timeout_(timeout_seconds),
      mapped_(geometry.size),
      written_(geometry.size),
      copied_(geometry.size) {
  const OnDevice on(device);
  require(kernels_.prepare(), "loading the kernels (built for another architecture?)");
  window_ = peer_access_->window(view_.at.bytes, Peers::world);
  pinned_ = std::make_unique<Pinned>(sizeof(FaultRecord));
  const uint64_t size = geometry.size, p = geometry.ranks_per_node, channels = shape.channels,
                 words = consumed_words(geometry);
  detail::Cursor c;
  const auto latches = c.take<uint64_t>(kLatchWords + kFailedWords);
  const auto consumed = c.take<DomainConsumed>(channels);
  const auto counts = c.take<uint64_t>(channels * words);
  const auto windows = c.take<char*>(p), regions = c.take<char*>(size);
  const auto counters = c.take<Counters>(1);
  const auto disagreed = c.take<int32_t>(1);
  const auto mask = c.take<uint64_t>((p + 63) / 64);
  state_ = DeviceMemory::create(device, c.at);
  room_ = DeviceMemory::create(device, kRoom);
  char* s = state_->data();
  latches_ = latches.in(s);
  consumed_ = consumed.in(s);
  counts_ = counts.in(s);
  disagreed_ = disagreed.in(s);
  std::vector<DomainConsumed> first;
  for (uint64_t i = 0; i < channels; ++i) first.push_back(make_consumed(geometry, counts_ + i * words));
  require(cudaMemcpy(consumed_, first.data(), channels * sizeof(DomainConsumed), cudaMemcpyHostToDevice),
          "writing the counts");
  links_.geometry = geometry;
  links_.windows = windows.in(s);
  links_.regions = regions.in(s);
  links_.same_device = mask.in(s);
  links_.rail_region = window_->data();  // one memory: the window is the region, too
  links_.window_faults = view_.at.window_faults;
  links_.region_faults = view_.at.region_faults;
  links_.region_peers = geometry.size;
  links_.own_peer = geometry.rank;
  links_.failed = latches_ + kLatchWords;
  calls_->introduce(links_, refusals());
  links_.own = nullptr;  // hosts wait for its calls
  links_.counters = counters.in(s);
}

void DeviceDomain::connect(const std::vector<std::string>& contacts) {
  const OnDevice on(device_);
  const Geometry& g = view_.geometry;
  window_->connect(g.rank, contacts);
  std::vector<char*> windows, regions;
  for (int d = 0; d < g.ranks_per_node; ++d) windows.push_back(window_->at(g.rank_at(g.node(), d)));
  for (int r = 0; r < g.size; ++r) {
    regions.push_back(view_.same_node(r) ? nullptr : window_->at(r));
    mapped_[r] = view_.same_node(r) || regions[r];
  }
  links_.network = window_->network();
  number_ = calls_->join();
  network_ = links_.network != nullptr;
  require(cudaMemcpy(links_.windows, windows.data(), 8 * windows.size(), cudaMemcpyHostToDevice),
          "writing the windows");
  require(cudaMemcpy(links_.regions, regions.data(), 8 * regions.size(), cudaMemcpyHostToDevice),
          "writing the regions");
}

Call DeviceDomain::begin() {
  ++made_;
  Call call;
  call.links = links_;
  call.spread = spread_;
  call.timeout_ns = static_cast<uint64_t>(timeout_ * 1e9);
  call.latches = latches_;
  call.awaited = true;  // the host waits for the result
  return call;
}

// One that every rank makes. The board does not tell its verbs apart: ranks agree on one before they move a
// byte, and stay in step where they do not.
Call DeviceDomain::begin_together() {
  Call call = begin();
  call.memory = number_;
  call.begins = true;
  return call;
}

Status DeviceDomain::settled(void* stream, const char* what) {
  require(cudaStreamSynchronize(as_stream(stream)), what);
  return fault();
}

// Calls on one stream use this memory one after another. A call on another stream waits for them first.
char* DeviceDomain::room(uint64_t bytes, void* stream) {
  const bool grows = bytes > room_->bytes();
  if (room_stream_ && (grows || room_stream_ != stream))
    require(cudaStreamSynchronize(as_stream(room_stream_)), "waiting for an earlier call");
  room_stream_ = stream;
  if (grows) room_ = DeviceMemory::create(device_, 2 * bytes);
  return room_->data();
}

void DeviceDomain::upload(char* to, const void* from, uint64_t bytes, void* stream) {
  if (bytes)
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, as_stream(stream)),
            "writing a call's arguments");
}

Status DeviceDomain::one_sided(OneSidedWork work, const std::vector<Rows>& rows, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(fault());
  const std::vector<Segment> segments = segments_of(rows, kWhole);
  work.d = view_;
  work.consumed = consumed_;
  if (segments.size() == 1) {
    work.only = segments[0];
  } else if (!segments.empty()) {
    const uint64_t bytes = segments.size() * sizeof(Segment);
    char* there = room(bytes, stream);
    upload(there, segments.data(), bytes, stream);
    work.segments = {Offset<Segment>{}.in(there), static_cast<int64_t>(segments.size())};
  }
  const OneSidedLaunch launch{begin(), work};
  require(kernels_.one_sided(launch, stream), "starting a request");
  return {};
}

Status DeviceDomain::write(int rank, const std::vector<Rows>& rows, int counter, void* stream) {
  written_[rank] = true;
  OneSidedWork work;
  work.rank = rank;
  work.counter = counter;
  return one_sided(work, rows, stream);
}

Status DeviceDomain::signal(int rank, int counter, uint64_t add, void* stream) {
  OneSidedWork work;
  work.verb = OneSided::signal;
  work.rank = rank;
  work.counter = counter;
  work.value = add;
  return one_sided(work, {}, stream);
}

Status DeviceDomain::read(int rank, const std::vector<Rows>& rows, void* stream) {
  if (written_[rank] && !mapped_[rank]) MOE_TRY(fence(stream));  // the read must see earlier writes
  const std::vector<Segment> segments = segments_of(rows, kWhole);
  if (mapped_[rank] && segments.size() <= kCopies) return copy_from(rank, segments, stream);
  OneSidedWork work;
  work.verb = OneSided::read;
  work.rank = rank;
  MOE_TRY(one_sided(work, rows, stream));
  return settled(stream, "reading");
}

Status DeviceDomain::copy_from(int rank, const std::vector<Segment>& segments, void* stream) {
  const OnDevice on(device_);
  MOE_TRY(fault());
  const char* peer = window_->at(rank);
  for (const Segment& s : segments) {
    require(cudaMemcpyAsync(s.here, peer + s.there, s.bytes, cudaMemcpyDeviceToDevice, as_stream(stream)),
            "copying from a peer");
    ++copied_[rank].rows;
    copied_[rank].bytes += s.bytes;
  }
  ++made_;
  return settled(stream, "reading");
}

Status DeviceDomain::wait(int source, int counter, uint64_t at_least, void* stream) {
  OneSidedWork work;
  work.verb = OneSided::wait;
  work.rank = source;
  work.counter = counter;
  work.value = at_least;
  MOE_TRY(one_sided(work, {}, stream));
  return settled(stream, "waiting for a counter");
}

// Stores to mapped peers are complete when the stream has completed.
Status DeviceDomain::fence(void* stream) {
  for (int r = 0; r < view_.geometry.size; ++r) {
    const bool written = written_[r];
    written_[r] = false;
    if (!written || mapped_[r]) continue;
    OneSidedWork work;
    work.verb = OneSided::fence;
    work.rank = r;
    MOE_TRY(one_sided(work, {}, stream));
  }
  return settled(stream, "fence");
}

template <class Args, class Launch>
Status DeviceDomain::together(Verb verb, const std::vector<GroupCall>& calls, Why refused, void* stream,
                              int (*start)(const Launch&, void*)) {
  const OnDevice on(device_);
  MOE_TRY(fault());
  Signature signature;
  signature.add(static_cast<uint64_t>(verb));
  std::vector<std::vector<Segment>> segments;
  detail::Cursor c;
  const auto at = c.take<Args>(calls.size());
  for (const GroupCall& call : calls) {
    segments.push_back(segments_of(call.rows, kSlotBytes));
    signature.add(call, segments.back());
    c.take<Segment>(segments.back().size());
    c.take<int32_t>(call.ranks.size());
  }
  // All arguments are copied at once; pointers in them are device addresses.
  char* there = room(c.at, stream);
  std::vector<char> staged(c.at);
  detail::Cursor filled;
  filled.take<Args>(calls.size());
  for (size_t i = 0; i < calls.size(); ++i) {
    const auto list = filled.take<Segment>(segments[i].size());
    const auto ranks = filled.take<int32_t>(calls[i].ranks.size());
    std::copy(segments[i].begin(), segments[i].end(), list.in(staged.data()));
    std::copy(calls[i].ranks.begin(), calls[i].ranks.end(), ranks.in(staged.data()));
    Args a;
    a.d = view_;
    a.root = calls[i].root;
    a.segments = {list.in(there), static_cast<int64_t>(segments[i].size())};
    a.consumed = consumed_;
    set_group(a, {ranks.in(there), static_cast<int32_t>(calls[i].ranks.size())}, calls[i].type);
    (at + i).in(staged.data())[0] = a;
  }
  upload(there, staged.data(), staged.size(), stream);
  MOE_TRY(calls_->start_together(*window_, stream, timeout_, [&] {
    const Launch launch{begin_together(),
                        {view_, consumed_, signature.value(), refused, disagreed_, at.in(there),
                         static_cast<int32_t>(calls.size())}};
    require(start(launch, stream), "starting a collective call");
  }));
  return settled(stream, "a collective call");
}

Status DeviceDomain::multicast(const std::vector<GroupCall>& calls, Why refused, void* stream) {
  for (const GroupCall& call : calls)
    if (call.root == view_.geometry.rank)
      for (int r : call.ranks) written_[r] = true;
  return together<MulticastArgs>(Verb::multicast, calls, refused, stream, kernels_.multicast);
}

Status DeviceDomain::reduce(const std::vector<GroupCall>& calls, Why refused, void* stream) {
  return together<ReduceArgs>(Verb::reduce, calls, refused, stream, kernels_.reduce);
}

// Uses a new stream: kernels on the caller's stream, or on the default stream, may wait for this rank.
uint64_t DeviceDomain::counter(int source, int counter) const {
  const OnDevice on(device_);
  uint64_t value = 0;
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  const cudaError_t read = cudaMemcpyAsync(&value, view_.user(source, counter).in(window_->data()), 8,
                                           cudaMemcpyDeviceToHost, stream);
  const cudaError_t done = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  require(read != cudaSuccess ? read : done, "reading a counter");
  return value;
}

Counters DeviceDomain::take_counters(std::vector<uint64_t>& links) {
  const OnDevice on(device_);
  require(cudaDeviceSynchronize(), "reading counters");
  Counters c;
  require(cudaMemcpy(&c, links_.counters, sizeof(c), cudaMemcpyDeviceToHost), "reading counters");
  require(cudaMemset(links_.counters, 0, sizeof(c)), "resetting counters");
  c.calls += std::exchange(made_, 0);
  const Geometry& g = view_.geometry;
  const uint64_t words = consumed_words(g);
  links.assign(g.size, 0);
  std::vector<uint64_t> counted(g.size);
  for (int channel = 0; channel < view_.shape.channels; ++channel) {
    uint64_t* link = make_consumed(g, counts_ + channel * words).link;
    require(cudaMemcpy(counted.data(), link, 8 * counted.size(), cudaMemcpyDeviceToHost), "reading counters");
    require(cudaMemset(link, 0, 8 * counted.size()), "resetting counters");
    for (int r = 0; r < g.size; ++r) links[r] += counted[r];
  }
  for (int r = 0; r < g.size; ++r) {
    const Copied moved = std::exchange(copied_[r], {});
    if (r == g.rank) continue;
    HopCounters& hop = view_.same_node(r) ? c.node : c.rail;
    hop.logical_rows += moved.rows;
    hop.physical_rows += moved.rows;
    hop.logical_bytes += moved.bytes;
    hop.physical_bytes += moved.bytes;
    links[r] += moved.bytes;
  }
  return c;
}

}  // namespace moecomm::cuda
