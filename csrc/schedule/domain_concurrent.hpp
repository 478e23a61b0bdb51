// The schedule of a Domain's verbs on many groups of a rank: which group moves what, and which groups wait
// for each other. Independent of the world, like schedule/concurrent.hpp.
//
//   one-sided    every group moves pieces -> [forwarded] -> the first group counts them and signals
//   collective   the first group agrees with the other ranks -> [entered] -> every group runs its channel
#pragma once
#include "schedule/concurrent.hpp"
#include "schedule/domain.hpp"

namespace moecomm {

enum class OneSided : int32_t { write, read, signal, wait, fence };

struct OneSidedWork {
  DomainView d;
  DomainConsumed* consumed = nullptr;  // [channels]
  OneSided verb = OneSided::write;
  int32_t rank = 0;
  int32_t counter = -1;  // a write adds the number of bytes to it; -1: none
  uint64_t value = 0;    // what a signal adds, or a wait waits for
  Segment only;          // of a write or read with one segment
  Segments segments;     // of a write or read with several
};

template <class Args>
struct CollectiveWork {
  DomainView d;
  DomainConsumed* consumed = nullptr;
  uint64_t signature = 0;
  Why refused = Why::none;
  int32_t* disagreed = nullptr;  // 1: no byte moves in this call
  const Args* args = nullptr;
  int32_t count = 0;
};

namespace detail {

constexpr uint64_t kPieceBytes = 16 << 10;  // the part of a segment that one group moves at a time

// Calls work() for this group's pieces of a segment. Group `first` takes the first piece. Returns the group
// that takes the first piece of the next segment.
template <class Work>
MOE_HD int each_piece(const Segment& x, int first, int index, int groups, Work&& work) {
  const uint64_t pieces = (x.bytes + kPieceBytes - 1) / kPieceBytes;
  for (uint64_t i = (index + groups - first) % groups; i < pieces; i += groups) {
    const uint64_t at = i * kPieceBytes, left = x.bytes - at;
    work(Segment{x.there + at, x.here + at, left < kPieceBytes ? left : kPieceBytes});
  }
  return static_cast<int>((first + pieces) % groups);
}

template <class Work>
MOE_HD void each_piece(const OneSidedWork& w, int index, int groups, Work&& work) {
  if (!w.segments.segment) {
    each_piece(w.only, 0, index, groups, work);
    return;
  }
  for (int64_t i = 0, first = 0; i < w.segments.count; ++i)
    first = each_piece(w.segments.segment[i], static_cast<int>(first), index, groups, work);
}

// Waits until everything that this rank has written to a peer is visible there: adds to a counter of the peer
// and reads the counter back until it shows the addition.
template <Group G, Fabric<G> F>
  requires ReadingFabric<F>
MOE_HD Status fence(G g, F f, const DomainView& d, int rank) {
  return leader(g, [&]() -> Status {
    const int me = d.geometry.rank;
    uint64_t* back = f.rail(d.at.fence_back + rank);
    const uint64_t wanted = *back + 1;
    f.signal_rail(rank, d.at.fenced + me, 1);
    do {
      f.get(rank, bytes_of(back), (d.at.fenced + me).value, sizeof(uint64_t));
      MOE_TRY(f.drain(Phase::flush, rank));
    } while (*const_cast<const volatile uint64_t*>(back) < wanted);
    return {};
  });
}

}  // namespace detail

template <Group G, Fabric<G> F, CallLatches<G> Latches>
  requires ReadingFabric<F>
MOE_HD Status one_sided_group(G g, F f, Latches latches, const OneSidedWork& w, int index, int groups) {
  const bool first = index == 0;
  if (w.verb == OneSided::signal) {
    if (first) notify(g, f, w.d, w.rank, w.counter, w.value);
    return {};
  }
  if (w.verb == OneSided::wait) return first ? await(g, f, w.d, w.rank, w.counter, w.value) : Status{};
  if (w.verb == OneSided::fence) return first ? detail::fence(g, f, w.d, w.rank) : Status{};
  if (w.verb == OneSided::write) {
    detail::each_piece(w, index, groups, [&](const Segment& x) { detail::write_one(g, f, w.d, w.rank, x); });
  } else {
    detail::each_piece(w, index, groups, [&](const Segment& x) { detail::read_one(g, f, w.d, w.rank, x); });
    MOE_TRY(leader(g, [&] { return f.drain(Phase::arrive, w.rank); }));
  }
  latches.arrive(g, Latch::forwarded);
  if (!first) return {};
  MOE_TRY(latches.wait(g, Latch::forwarded, groups));
  if (g.lane() == 0) {
    detail::Moved moved;
    if (w.segments.segment) {
      moved.add(w.segments, 0, w.segments.count);
    } else {
      moved = {1, w.only.bytes};
    }
    detail::count_hop(f, w.d, w.consumed, w.rank, moved.rows, moved.bytes);
    if (w.verb == OneSided::write && w.counter >= 0)
      detail::signal(f, w.d, w.rank, w.d.user(w.d.geometry.rank, w.counter), moved.bytes);
  }
  g.sync();
  return {};
}

// Every group runs role(channel) if the ranks agree. There are as many groups as channels.
template <Group G, Fabric<G> F, CallLatches<G> Latches, class Args, class Role>
MOE_HD Status collective_group(G g, F f, Latches latches, const CollectiveWork<Args>& w, int channel,
                               Role&& role) {
  if (channel == 0) {
    const Status s = agree(g, f, w.d, w.consumed, w.signature, w.refused);
    if (g.lane() == 0) *w.disagreed = !s.ok();
    latches.arrive(g, Latch::entered);
    if (!s.ok()) return s;
  } else {
    MOE_TRY(latches.wait(g, Latch::entered, 1));
    if (*const_cast<const volatile int32_t*>(w.disagreed)) return {};
  }
  return role(channel);
}

template <Group G, Fabric<G> F, CallLatches<G> Latches>
MOE_HD Status multicast_group(G g, F f, Latches latches, const CollectiveWork<MulticastArgs>& w,
                              int channel) {
  return collective_group(g, f, latches, w, channel,
                          [&](int c) { return run_multicast(g, f, w.args, w.count, c); });
}

template <Group G, Fabric<G> F, CallLatches<G> Latches>
MOE_HD Status reduce_group(G g, F f, Latches latches, const CollectiveWork<ReduceArgs>& w, int channel) {
  return collective_group(g, f, latches, w, channel,
                          [&](int c) { return run_reduce(g, f, w.args, w.count, c); });
}

}  // namespace moecomm
