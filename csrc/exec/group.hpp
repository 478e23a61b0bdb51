// Group: who executes a role. Roles are SPMD: every lane of a group calls the same function, splits
// loops by lane, and only lane 0 signals or waits. A CPU rank is one lane, a GPU warp is 32.
#pragma once
#include <concepts>

#include "base/types.hpp"

namespace moecomm {

template <class G>
concept Group = requires(G g, int v) {
  { g.lane() } -> std::convertible_to<int>;
  { g.size() } -> std::convertible_to<int>;
  g.sync();                                    // all lanes meet; earlier writes of each are seen by all
  { g.broadcast(v, 0) } -> std::same_as<int>;  // lane 0's value, after a sync
};

// Lane 0 runs `f`, everyone gets its Status. What lane 0 acquired is visible to all lanes.
template <Group G, class F>
MOE_HD Status leader(G g, F&& f) {
  Status s;
  if (g.lane() == 0) s = f();
  if (g.broadcast(s.ok(), 0)) return {};  // the usual case costs one word
  return g.broadcast(s, 0);
}

// Each lane found something or not; everyone gets the finding of the first lane that has one.
template <Group G>
MOE_HD Status first_failure(G g, const Status& mine) {
  if constexpr (requires { g.any(true); })  // a large group asks first whether there is one at all
    if (!g.any(!mine.ok())) return {};
  for (int lane = 0; lane < g.size(); ++lane)
    if (!g.broadcast(mine.ok(), lane)) return g.broadcast(mine, lane);
  return {};
}

}  // namespace moecomm
