// Two roles of one's own over a Domain, for every world. docs/write_a_role.md goes through them.
//
//   ring_gather   [all ranks]  sends every rank's block to all ranks around a ring, so that each block
//                              uses each link once
//   spread_hot    [all ranks]  sends the weights of experts with many tokens from their owners to all ranks;
//                              every rank finds these experts in its own counts, without its host
#pragma once
#include "protocol/verbs.hpp"
#include "protocol/verbs_multicast.hpp"

namespace own_roles {

using namespace moecomm;

struct RingArgs {
  DomainView d;
  DomainConsumed* consumed = nullptr;
  uint64_t blocks = 0;  // offset in every rank's memory of one block per rank; this rank has filled its own
  uint64_t bytes = 0;   // of a block
  int32_t counter = 0;  // of the domain; no other call uses it
  uint64_t rounds = 0;  // rings that were made with this counter before
};

// Ranks begin when no rank needs the blocks of the previous ring, which is after a barrier.
//
// The block that a rank sends in a step is the one that came in the step before. Who sees the counter sees
// the block, so there is nothing else to wait for.
template <Group G, Fabric<G> F>
MOE_HD Status ring_gather(G g, F f, const RingArgs& a) {
  const int rank = a.d.geometry.rank, size = a.d.geometry.size;
  const int right = (rank + 1) % size, left = (rank + size - 1) % size;
  char* own = f.window(a.d.geometry.local());
  for (int step = 0; step + 1 < size; ++step) {
    const uint64_t block = a.blocks + uint64_t((rank + size - step) % size) * a.bytes;
    detail::write_one(g, f, a.d, right, Segment{block, own + block, a.bytes});
    g.sync();
    notify(g, f, a.d, right, a.counter, 1);
    MOE_TRY(await(g, f, a.d, left, a.counter, a.rounds * (size - 1) + step + 1));
  }
  return {};
}

struct HotArgs {
  const MulticastArgs* expert = nullptr;  // [count] of every expert: from its owner to all ranks
  const int64_t* tokens = nullptr;        // [count] equal on all ranks
  int32_t count = 0;
  int64_t least = 0;  // tokens that make an expert hot
};

// Ranks begin together (agree() of verbs_agree.hpp, or a barrier). One channel's part: roles are made of
// roles.
template <Group G, Fabric<G> F>
MOE_HD Status spread_hot(G g, F f, const HotArgs& a, int channel) {
  const auto is_hot = [&a](int i) { return a.tokens[i] >= a.least; };
  for (int i = 0; i < a.count; ++i)
    if (is_hot(i)) multicast_send(g, f, a.expert[i], channel);
  for (int i = 0; i < a.count; ++i)
    if (is_hot(i)) MOE_TRY(multicast_forward(g, f, a.expert[i], channel));
  for (int i = 0; i < a.count; ++i)
    if (is_hot(i)) MOE_TRY(multicast_arrive(g, f, a.expert[i], channel));
  return {};
}

}  // namespace own_roles
