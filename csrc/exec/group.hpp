// Group: the lanes that execute a role. Roles are SPMD: every lane of a group calls the same function and
// takes its part of each loop; only lane 0 signals or waits. A CPU rank is one lane, a GPU warp has 32.
#pragma once
#include <concepts>

#include "base/types.hpp"

namespace moecomm {

template <class G>
concept Group = requires(G g, int v) {
  { g.lane() } -> std::convertible_to<int>;
  { g.size() } -> std::convertible_to<int>;
  g.sync();                                    // a barrier; earlier writes of each lane are visible to all
  { g.broadcast(v, 0) } -> std::same_as<int>;  // the value of lane 0; includes a sync
};

// Lane 0 runs `f`; all lanes get its Status. What lane 0 acquired is visible to all lanes.
template <Group G, class F>
MOE_HD Status leader(G g, F&& f) {
  Status s;
  if (g.lane() == 0) s = f();
  if (g.broadcast(s.ok(), 0)) return {};  // the common case broadcasts one word only
  return g.broadcast(s, 0);
}

// All lanes get the Status of the first lane whose Status is not ok.
template <Group G>
MOE_HD Status first_failure(G g, const Status& mine) {
  if constexpr (requires { g.any(true); })  // a large group first tests whether there is a failure
    if (!g.any(!mine.ok())) return {};
  for (int lane = 0; lane < g.size(); ++lane)
    if (!g.broadcast(mine.ok(), lane)) return g.broadcast(mine, lane);
  return {};
}

}  // namespace moecomm
