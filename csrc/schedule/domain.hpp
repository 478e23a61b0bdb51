// The schedule of a Domain's collective verbs on one rank: the roles of a channel run one after another.
#pragma once
#include <type_traits>
#include <vector>

#include "protocol/verbs_agree.hpp"
#include "protocol/verbs_multicast.hpp"
#include "protocol/verbs_reduce.hpp"

namespace moecomm {

// One channel. Sends never wait; forwards wait for sends only.
template <Group G, Fabric<G> F>
MOE_HD Status run_multicast(G g, F f, const MulticastArgs* args, int count, int channel = 0) {
  for (int i = 0; i < count; ++i) multicast_send(g, f, args[i], channel);
  for (int i = 0; i < count; ++i) MOE_TRY(multicast_forward(g, f, args[i], channel));
  for (int i = 0; i < count; ++i) MOE_TRY(multicast_arrive(g, f, args[i], channel));
  return {};
}

template <Group G, Fabric<G> F>
MOE_HD Status run_reduce(G g, F f, const ReduceArgs* args, int count, int channel = 0) {
  for (int i = 0; i < count; ++i) {
    MOE_TRY(reduce_send(g, f, args[i], channel));
    MOE_TRY(reduce_sum(g, f, args[i], channel));
    reduce_release(g, f, args[i], channel);
  }
  for (int i = 0; i < count; ++i) MOE_TRY(reduce_finish(g, f, args[i], channel));
  return {};
}

}  // namespace moecomm
