// Fabric: what a role may do to memory and links. The protocol knows only this contract.
//
// Memory   Every rank owns a node window (mapped by the ranks of its node) and a rail region (written
//          by its rail peers). Offsets come from base/layout.hpp and are the same on every rank.
// Peers    put() and signal_rail() name a peer by its index: dispatch and combine know one per node (the
//          rail), decode one per rank of the world (those of other nodes).
// Ordering put() and signal_rail() of one group to one peer are ordered: whoever sees the signal sees the
//          puts that were issued before it. So are puts of other groups, if they come before the signal (by a
//          gate) and these groups' fabrics share a stream: a fabric over a network is given one, all others
//          have a single one. signal_node() releases all earlier writes of the calling group (after a
//          sync()). wait_*() acquires. Nothing is ordered between different peers.
// Counters are 64-bit, only ever grow, and have one writer each.
// Lanes    Row operations are called by all lanes together; put, signal and wait by one lane. reduce_rows may
//          fetch the rows of `next` ahead, but other lanes may still be writing that list: only a group of
//          one lane reads it.
// Rows     A row operation may still be under way when it returns. Signals and puts of the same group come
//          after it; a lane that reads the row itself calls settle() first.
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
  { f.window(0) } -> std::same_as<char*>;                          // of a local rank: where it begins
  { f.window(0, Offset<uint64_t>{}) } -> std::same_as<uint64_t*>;  // (local rank, offset of whatever)
  { f.rail(Offset<uint64_t>{}) } -> std::same_as<uint64_t*>;       // in this rank's rail region
  f.put(0, uint64_t{}, source, uint64_t{});                        // (peer, offset there, source, bytes)
  f.signal_rail(0, CounterAt{}, uint64_t{});                       // (peer, counter, add)
  f.signal_node(0, CounterAt{}, uint64_t{});                       // (local rank, counter, add)
  // (counter, at least, phase, rank that is waited for)
  { f.wait_rail(CounterAt{}, uint64_t{}, phase, 0) } -> std::same_as<Status>;
  { f.wait_node(CounterAt{}, uint64_t{}, phase, 0) } -> std::same_as<Status>;
  { f.counters() } -> std::same_as<Counters&>;  // of the calling group; lane 0 counts
  { f.terms(0) } -> std::same_as<TermStore&>;   // two lists of the calling group, shared by its lanes
  { f.targets() } -> std::same_as<char**>;      // kMaxTopK pointers of the calling group, shared by its lanes
  { f.replicates(0) } -> std::same_as<bool>;    // to this local rank: a further copy of a row crosses no link
  // false: sources of puts must lie in the rail region
  { F::kPutsFromAnywhere } -> std::convertible_to<bool>;
};

// A lane's part, and what all lanes of a group do together.
template <class F, class G>
concept Fabric = LaneFabric<F> && Group<G> &&
                 requires(F f, G g, char* to, const char* from, char** targets, const Terms& terms,
                          const Terms* next, const float* bias) {
                   f.copy_row(g, to, from, uint64_t{});
                   f.spread_row(g, targets, 0, from, uint64_t{});  // one row to several places
                   f.zero_row(g, to, uint64_t{});
                   // The sum of the terms; decodes those that are coded. Then the same, stored as a wire row.
                   f.reduce_rows(g, to, terms, next, bias, int64_t{}, DType{});
                   f.reduce_encode(g, to, Wire{}, terms, next, int64_t{}, DType{});
                   // (codes, scales, row, hidden, type, kind): a row in FP8
                   f.quantize_row(g, to, to, from, int64_t{}, DType{}, ScaleKind{});
                   f.settle(g);  // lanes may read what the group's row operations wrote
                 };

// One lane: whole records to the same offset of a peer's rail region; put_bytes: those that are longer than
// their type says.
template <LaneFabric F, class T>
MOE_HD void put_bytes(F f, int peer, Offset<T> there, const T* source, uint64_t bytes) {
  f.put(peer, there.value, bytes_of(source), bytes);
}
template <LaneFabric F, class T>
MOE_HD void put(F f, int peer, Offset<T> there, const T* source, uint64_t count = 1) {
  put_bytes(f, peer, there, source, sizeof(T) * count);
}

// A fabric may also have reach(peer, offset): the peer's rail region itself where stores get there (ranks of
// other nodes on one host), null where they do not. Signals order such stores like puts.
template <LaneFabric F>
MOE_HD char* reach(F f, int peer, Offset<char> offset) {
  if constexpr (requires { f.reach(peer, offset); })
    return f.reach(peer, offset);
  else
    return nullptr;
}

}  // namespace moecomm
