// The layout of a Domain's memory. One function gives every offset AND the total size. The memory is the node
// window and the rail region in one: ranks of the node map it, and ranks of other nodes put into it.
#pragma once
#include "base/layout.hpp"

namespace moecomm {

// Fixed for the life of a Domain, equal on every rank.
struct DomainShape {
  uint64_t heap_bytes = 0;
  int32_t counters = 0;  // for users, per source rank
  int32_t channels = 1;  // parts of a collective call that groups execute concurrently

  MOE_HD constexpr uint64_t slots() const;  // sums of a node and channel that may be in flight to a root
};

// What a rank or a node announces at the start of a collective verb: which call it makes, and whether it
// refuses.
struct CallWord {
  uint64_t signature = 0;  // of the call and its arguments
  Code code = Code::ok;    // ok, refused, or mismatch
  int32_t rank = 0;        // if the code is not ok: the rank that caused it
  Why why = Why::none;
  int32_t unused = 0;
};

constexpr uint64_t kSlotBytes =
    64 << 10;                   // the most bytes that one signal announces; a node's sum on the rail
constexpr int kSlots = 8;       // slots of a node, over all channels
constexpr int kLeastSlots = 2;  // slots of one channel, at least

MOE_HD constexpr uint64_t DomainShape::slots() const {
  return kSlots / channels > kLeastSlots ? kSlots / channels : kLeastSlots;
}

struct DomainLayout {
  CounterAt user;                   // per source rank and number: signals of users
  CounterAt entered;                // per local rank: its word has arrived
  CounterAt agreed;                 // per node: the word of the rail peer there has arrived
  CounterAt landed;                 // per rank and channel: pieces of multicasts that it delivered here
  CounterAt summed;                 // per node and channel: sums of its gateway that landed here
  CounterAt taken;                  // per node and channel: sums of this rank that a root there has read
  CounterAt released;               // per local rank and channel: it has read this rank's contribution
  CounterAt fenced;                 // per rank: its fences that have arrived here
  Offset<CallWord> words;           // per parity and local rank
  Offset<CallWord> verdicts;        // per parity and node
  Offset<CallWord> word_out;        // per parity: source of the puts to the rail peers
  Offset<FaultWord> window_faults;  // per local rank
  Offset<FaultWord> region_faults;  // per rank
  Offset<FaultWord> fault_out;      // source of outgoing puts
  Offset<uint64_t> fence_back;      // per rank: its counter of this rank's fences, as last read
  uint64_t warm;                    // end of the memory that is committed at start
  Offset<char> slots;               // per node and channel: sums that arrived over the rail
  Offset<char> slots_out;           // per node and channel: outgoing sums
  Offset<char> heap;                // tensors
  uint64_t bytes;
};

MOE_HD constexpr DomainLayout domain_layout(const Geometry& g, const DomainShape& s) {
  DomainLayout l{};
  detail::Cursor c;
  const uint64_t size = g.size, nodes = g.nodes(), p = g.ranks_per_node, channels = s.channels;
  c.take(sizeof(MemoryHeader));
  l.user = c.take<uint64_t>(size * s.counters);
  l.entered = c.take<uint64_t>(p);
  l.agreed = c.take<uint64_t>(nodes);
  l.landed = c.take<uint64_t>(size * channels);
  l.summed = c.take<uint64_t>(nodes * channels);
  l.taken = c.take<uint64_t>(nodes * channels);
  l.released = c.take<uint64_t>(p * channels);
  l.fenced = c.take<uint64_t>(size);
  l.words = c.take<CallWord>(2 * p);
  l.verdicts = c.take<CallWord>(2 * nodes);
  l.word_out = c.take<CallWord>(2);
  l.window_faults = c.take<FaultWord>(p);
  l.region_faults = c.take<FaultWord>(size);
  l.fault_out = c.take<FaultWord>(1);
  l.fence_back = c.take<uint64_t>(size);
  l.warm = c.at;
  const uint64_t sums = nodes > 1 ? nodes * channels * s.slots() * kSlotBytes : 0;
  l.slots = c.take<char>(sums, 4096);
  l.slots_out = c.take<char>(sums, 4096);
  l.heap = c.take<char>(s.heap_bytes, 4096);
  l.bytes = align_up(c.at, 4096);
  return l;
}

}  // namespace moecomm
