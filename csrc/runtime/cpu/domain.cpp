#include "runtime/cpu/domain.hpp"

#include "exec/lane.hpp"
#include "schedule/domain.hpp"

namespace moecomm {
namespace {

constexpr uint64_t kWhole = ~uint64_t{0};

PeerMemoryLayout peer_memory_layout(const DomainView& d) {
  PeerMemoryLayout p;
  p.one_memory = true;
  p.window_bytes = p.region_bytes = d.at.bytes;
  p.window_faults = d.at.window_faults;
  p.region_faults = d.at.region_faults;
  p.region_counters = d.at.words.value;
  p.fault_out = d.at.fault_out;
  p.warm_bytes = d.at.warm;
  p.own = d.geometry.rank;
  for (int r = 0; r < d.geometry.size; ++r) p.peers.push_back(d.same_node(r) ? -1 : r);
  return p;
}

Segments view_of(const std::vector<Segment>& segments) {
  return {segments.data(), static_cast<int64_t>(segments.size())};
}

}  // namespace

Domain::Domain(std::shared_ptr<Communicator> comm, DomainShape shape)
    : view_(make_domain_view(comm->geometry(), shape)),
      peer_memory_(comm, peer_memory_layout(view_)),
      counts_(comm->geometry()),
      written_(comm->geometry().size) {}

Status Domain::write(int rank, const std::vector<Rows>& rows, int counter) {
  const std::vector<Segment> segments = segments_of(rows, kWhole);
  return write(rank, view_of(segments), counter);
}

Status Domain::read(int rank, const std::vector<Rows>& rows) {
  const std::vector<Segment> segments = segments_of(rows, kWhole);
  return read(rank, view_of(segments));
}

Status Domain::write(int rank, Segments segments, int counter) {
  const uint64_t bytes = detail::total_bytes(segments);
  return one_sided("write", bytes, [&](auto f) -> Status {
    written_[rank] = true;
    write_segments(Lane{}, f, view_, &counts_.consumed, rank, segments);
    if (counter >= 0) notify(Lane{}, f, view_, rank, counter, bytes);
    return view_.same_node(rank) ? Status{} : f.drain(Phase::send, rank);
  });
}

Status Domain::read(int rank, Segments segments) {
  return one_sided("read", detail::total_bytes(segments), [&](auto f) -> Status {
    if (written_[rank] && !view_.same_node(rank))
      MOE_TRY(peer_memory_.flush());  // the read must see earlier writes
    read_segments(Lane{}, f, view_, &counts_.consumed, rank, segments);
    return view_.same_node(rank) ? Status{} : f.drain(Phase::arrive, rank);
  });
}

Status Domain::signal(int rank, int counter, uint64_t add) {
  return one_sided("signal", 0, [&](auto f) -> Status {
    notify(Lane{}, f, view_, rank, counter, add);
    return {};
  });
}

Status Domain::wait(int source, int counter, uint64_t at_least) {
  return one_sided("wait", 0, [&](auto f) { return await(Lane{}, f, view_, source, counter, at_least); });
}

Status Domain::fence() {
  return one_sided("fence", 0, [&](auto f) -> Status {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    MOE_TRY(peer_memory_.flush());
    if (const Status reported = reported_fault(peer_memory_.host()); !reported.ok()) return reported;
    for (int r = 0; r < view_.geometry.size; ++r) {
      if (!written_[r]) continue;
      written_[r] = false;
      const int dead = comm().watch().lost(r), lost = dead < 0 ? f.rail_link->lost(r) : dead;
      if (lost >= 0) return {Code::lost, Phase::flush, lost, 0, 1, 0};
    }
    return {};
  });
}

uint64_t Domain::counter(int source, int counter) const {
  return counter_at(peer_memory_.window()->data(), view_.user(source, counter).value)
      .load(std::memory_order_acquire);
}

template <class Args, class Role>
Status Domain::together(Verb verb, const char* op, const std::vector<GroupCall>& calls, Why refused,
                        Role&& role) {
  std::vector<std::vector<Segment>> segments;
  std::vector<Args> args;
  Signature signature;
  uint64_t bytes = 0;
  signature.add(static_cast<uint64_t>(verb));
  for (const GroupCall& call : calls) {
    segments.push_back(segments_of(call.rows, kSlotBytes));
    signature.add(call, segments.back());
    Args a;
    a.d = view_;
    a.root = call.root;
    a.segments = view_of(segments.back());
    a.consumed = &counts_.consumed;
    set_group(a, {call.ranks.data(), static_cast<int32_t>(call.ranks.size())}, call.type);
    bytes += detail::total_bytes(a.segments);
    args.push_back(a);
  }
  const CallScope scope(comm().calls(), op);
  if (!scope.entered()) return {Code::interrupted};
  comm().begin_call(verb, peer_memory_.number());
  peer_memory_.begin(bytes >= kStream);
  const Status s = peer_memory_.run(false, [&](auto f) -> Status {
    MOE_TRY(agree(Lane{}, f, view_, &counts_.consumed, signature.value(), refused));
    MOE_TRY(role(f, args.data(), static_cast<int>(args.size())));
    return f.drain(Phase::done, -1);
  });
  ++peer_memory_.host().counters.calls;
  return s;
}

Status Domain::multicast(const std::vector<GroupCall>& calls, Why refused) {
  return together<MulticastArgs>(
      Verb::multicast, "multicast", calls, refused,
      [](auto f, const MulticastArgs* a, int n) { return run_multicast(Lane{}, f, a, n); });
}

Status Domain::reduce(const std::vector<GroupCall>& calls, Why refused) {
  return together<ReduceArgs>(Verb::reduce, "reduce", calls, refused,
                              [](auto f, const ReduceArgs* a, int n) { return run_reduce(Lane{}, f, a, n); });
}

Counters Domain::take_counters(std::vector<uint64_t>& links) {
  std::lock_guard lock(comm().calls());
  const Counters c = peer_memory_.host().counters;
  peer_memory_.host().counters = {};
  uint64_t* link = counts_.consumed.link;
  links.assign(link, link + view_.geometry.size);
  std::fill_n(link, view_.geometry.size, 0);
  return c;
}

}  // namespace moecomm
