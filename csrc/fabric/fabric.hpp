// Fabric: how roles access memory and links. The protocol depends on this contract only.
//
// Memory   Every rank owns a node window (mapped by the ranks of its node) and a rail region (written
//          by its rail peers). Offsets come from base/layout.hpp and are the same on every rank.
// Peers    put() and signal_rail() name a peer by an index: in dispatch and combine the peer's node (the peer
//          is on this rank's rail), in decode the peer's rank (it is on another node).
// Ordering put() and signal_rail() of one group to one peer are ordered: a peer that sees the signal sees the
//          puts that were issued before it. This includes puts of other groups, if a latch orders them before
//          the signal and the groups' fabrics share a stream. (A fabric over a network is given its stream;
//          every other fabric has only one.) signal_node() releases all earlier writes of the calling group
//          (after a sync()). wait_*() acquires. There is no order between different peers.
// Counters are 64-bit, only grow, and have one writer each.
// Lanes    All lanes together call a row operation; one lane calls put, signal or wait. reduce_rows may
//          prefetch the rows of `next`, but other lanes may still be writing that list, so only a group of
//          one lane reads it.
// Rows     A row operation may still be in flight when it returns. Signals and puts of the same group are
//          ordered after it. A lane that reads the row itself first calls finish_rows().
#pragma once
#include <concepts>

#include "base/counters.hpp"
#include "base/offset.hpp"
#include "base/terms.hpp"
#include "exec/group.hpp"

namespace moecomm {

// What one lane does: memory, puts, signals, waits.
template <class F>
concept LaneFabric = requires(F f, const char* source, Phase phase) {
  { f.window(0) } -> std::same_as<char*>;                          // (local rank): the base address
  { f.window(0, Offset<uint64_t>{}) } -> std::same_as<uint64_t*>;  // (local rank, offset of any type)
  { f.rail(Offset<uint64_t>{}) } -> std::same_as<uint64_t*>;       // in this rank's rail region
  f.put(0, uint64_t{}, source, uint64_t{});                        // (peer, offset there, source, bytes)
  f.signal_rail(0, CounterAt{}, uint64_t{});                       // (peer, counter, add)
  f.signal_node(0, CounterAt{}, uint64_t{});                       // (local rank, counter, add)
  // (counter, at least, phase, rank that adds to the counter)
  { f.wait_rail(CounterAt{}, uint64_t{}, phase, 0) } -> std::same_as<Status>;
  { f.wait_node(CounterAt{}, uint64_t{}, phase, 0) } -> std::same_as<Status>;
  { f.counters() } -> std::same_as<Counters&>;  // of the calling group; only lane 0 counts
  { f.terms(0) } -> std::same_as<TermStore&>;   // two lists of the calling group, shared by its lanes
  { f.targets() } -> std::same_as<char**>;      // kMaxTopK pointers of the calling group, shared by its lanes
  { f.replicates(0) } -> std::same_as<bool>;    // (local rank): further copies of a row to it cross no link
  // false: the sources of puts must be in the rail region
  { F::kPutsFromAnywhere } -> std::convertible_to<bool>;
};

// What one lane does, and what all lanes of a group do together.
template <class F, class G>
concept Fabric = LaneFabric<F> && Group<G> &&
                 requires(F f, G g, char* to, const char* from, char** targets, const Terms& terms,
                          const Terms* next, const float* bias) {
                   f.copy_row(g, to, from, uint64_t{});
                   f.spread_row(g, targets, 0, from, uint64_t{});  // one row to several places
                   f.zero_row(g, to, uint64_t{});
                   // The sum of the terms, which may be quantized. reduce_encode stores it in a wire format.
                   f.reduce_rows(g, to, terms, next, bias, int64_t{}, DType{});
                   f.reduce_encode(g, to, Wire{}, terms, next, int64_t{}, DType{});
                   // (codes, scales, row, hidden, type, kind): a row in FP8
                   f.quantize_row(g, to, to, from, int64_t{}, DType{}, ScaleKind{});
                   f.finish_rows(g);  // then lanes may read what the group's row operations wrote
                 };

// A fabric that also reads over the rail. get() is asynchronous, like put(). drain() waits until the sources
// of all puts may be overwritten and the bytes of all gets have arrived.
template <class F>
concept ReadingFabric = LaneFabric<F> && requires(F f, char* to, Phase phase) {
  f.get(0, to, uint64_t{}, uint64_t{});  // (peer, to, offset there, bytes)
  { f.drain(phase, 0) } -> std::same_as<Status>;
};

// One lane: puts records to an offset of a peer's rail region. put_bytes is for records that are longer than
// their type.
template <LaneFabric F, class T>
MOE_HD void put_bytes(F f, int peer, Offset<T> there, const T* source, uint64_t bytes) {
  f.put(peer, there.value, bytes_of(source), bytes);
}
template <LaneFabric F, class T>
MOE_HD void put(F f, int peer, Offset<T> there, const T* source, uint64_t count = 1) {
  put_bytes(f, peer, there, source, sizeof(T) * count);
}

// A fabric may also have reach(peer, offset): an address in the peer's rail region if stores can reach it
// (nodes on one host), else null. Signals order such stores like puts.
template <LaneFabric F>
MOE_HD char* reach(F f, int peer, Offset<char> offset) {
  if constexpr (requires { f.reach(peer, offset); })
    return f.reach(peer, offset);
  else
    return nullptr;
}

}  // namespace moecomm
