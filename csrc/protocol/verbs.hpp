// One-sided verbs: write, read, signal, wait. The peer takes no part.
//
//   write_segments  [any rank]  writes segments to the memory of a rank, over the network that leads there
//   read_segments   [any rank]  reads segments from there; call drain() of the fabric before using the bytes
//   notify          [any rank]  adds to a counter, after all earlier writes of this group to that rank
//   await           [any rank]  waits until a source's counter has at least a given value
//
// Only await() and the fabric's drain() wait. Writes to different ranks are not ordered.
#pragma once
#include "fabric/fabric.hpp"
#include "protocol/verbs_views.hpp"

namespace moecomm {

namespace detail {

// The address in a rank's memory if this group's stores reach it, else null.
template <LaneFabric F>
MOE_HD char* reachable(F f, const DomainView& d, int rank, uint64_t offset) {
  if (d.same_node(rank)) return f.window(d.local_of(rank)) + offset;
  return reach(f, rank, Offset<char>{offset});
}

MOE_HD inline uint64_t total_bytes(Segments p) {
  uint64_t bytes = 0;
  for (int64_t i = 0; i < p.count; ++i) bytes += p.segment[i].bytes;
  return bytes;
}

// The end of the run of segments that begins here. One signal announces a run.
MOE_HD inline int64_t run_end(Segments p, int64_t begin) {
  uint64_t bytes = 0;
  int64_t i = begin;
  while (i < p.count && (i == begin || bytes + p.segment[i].bytes <= kSlotBytes))
    bytes += p.segment[i++].bytes;
  return i;
}

// Calls work(begin, end) for the runs of a channel, in order. Runs are assigned to channels round-robin.
template <class Work>
MOE_HD Status each_run(const DomainView& d, Segments p, int channel, Work&& work) {
  int next_channel = 0;
  for (int64_t i = 0, end; i < p.count; i = end) {
    end = run_end(p, i);
    if (next_channel == channel) MOE_TRY(work(i, end));
    next_channel = next_channel + 1 == d.shape.channels ? 0 : next_channel + 1;
  }
  return {};
}

// Lane 0 counts what crossed a hop to one rank.
template <LaneFabric F>
MOE_HD void count_hop(F f, const DomainView& d, DomainConsumed* consumed, int rank, uint64_t rows,
                      uint64_t bytes, bool crosses = true) {
  if (rank == d.geometry.rank) return;
  HopCounters& hop = d.same_node(rank) ? f.counters().node : f.counters().rail;
  hop.logical_rows += rows;
  hop.logical_bytes += bytes;
  if (!crosses) return;
  hop.physical_rows += rows;
  hop.physical_bytes += bytes;
  consumed->link[rank] += bytes;
}

// Counts of the segments that a channel has moved.
struct Moved {
  uint64_t rows = 0, bytes = 0;
  MOE_HD void add(Segments p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) bytes += p.segment[i].bytes;
    rows += end - begin;
  }
};

// Copies one segment to a rank, or from it.
template <Group G, Fabric<G> F>
MOE_HD void write_one(G g, F f, const DomainView& d, int rank, const Segment& x) {
  if (char* to = reachable(f, d, rank, x.there)) {
    if (to != x.here) f.copy_row(g, to, x.here, x.bytes);
  } else if (g.lane() == 0) {
    f.put(rank, x.there, x.here, x.bytes);
  }
}
template <Group G, Fabric<G> F>
  requires ReadingFabric<F>
MOE_HD void read_one(G g, F f, const DomainView& d, int rank, const Segment& x) {
  if (const char* from = reachable(f, d, rank, x.there)) {
    if (from != x.here) f.copy_row(g, x.here, from, x.bytes);
  } else if (g.lane() == 0) {
    f.get(rank, x.here, x.there, x.bytes);
  }
}

// Copies segments [begin, end) to a rank.
template <Group G, Fabric<G> F>
MOE_HD void copy_out(G g, F f, const DomainView& d, int rank, Segments p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) write_one(g, f, d, rank, p.segment[i]);
}

// One lane.
template <LaneFabric F>
MOE_HD void signal(F f, const DomainView& d, int rank, CounterAt at, uint64_t add) {
  if (d.same_node(rank))
    f.signal_node(d.local_of(rank), at, add);
  else
    f.signal_rail(rank, at, add);
}
template <LaneFabric F>
MOE_HD Status await_counter(F f, const DomainView& d, int from, CounterAt at, uint64_t at_least,
                            Phase phase) {
  return d.same_node(from) ? f.wait_node(at, at_least, phase, from) : f.wait_rail(at, at_least, phase, from);
}

}  // namespace detail

template <Group G, Fabric<G> F>
MOE_HD void write_segments(G g, F f, const DomainView& d, DomainConsumed* consumed, int rank, Segments p) {
  detail::copy_out(g, f, d, rank, p, 0, p.count);
  if (g.lane() == 0) detail::count_hop(f, d, consumed, rank, p.count, detail::total_bytes(p));
  g.sync();
}

template <Group G, Fabric<G> F>
  requires ReadingFabric<F>
MOE_HD void read_segments(G g, F f, const DomainView& d, DomainConsumed* consumed, int rank, Segments p) {
  for (int64_t i = 0; i < p.count; ++i) detail::read_one(g, f, d, rank, p.segment[i]);
  if (g.lane() == 0) detail::count_hop(f, d, consumed, rank, p.count, detail::total_bytes(p));
  g.sync();
}

template <Group G, Fabric<G> F>
MOE_HD void notify(G g, F f, const DomainView& d, int rank, int number, uint64_t add) {
  if (g.lane() == 0) detail::signal(f, d, rank, d.user(d.geometry.rank, number), add);
}

template <Group G, Fabric<G> F>
MOE_HD Status await(G g, F f, const DomainView& d, int source, int number, uint64_t at_least) {
  return leader(g, [&] {
    return detail::await_counter(f, d, source, d.user(source, number), at_least, Phase::arrive);
  });
}

}  // namespace moecomm
