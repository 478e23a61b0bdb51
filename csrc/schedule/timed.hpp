// Timelines: records when the roles of a rank's calls ran.
#pragma once
#include <chrono>

#include "base/roles.hpp"
#include "fabric/fabric.hpp"

namespace moecomm {

// Runs one role of a call. If the fabric has a timeline and tracing is on, the role's span is recorded there.
template <Group G, Fabric<G> F, class Work>
auto timed(G g, F f, RoleKind role, Work work) {
  if constexpr (requires { f.timeline(); }) {
    struct Clock {
      static int64_t now() {
        return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
      }
      decltype(f.timeline()) timeline;
      RoleKind role;
      int64_t begin = timeline ? now() : 0;
      ~Clock() {
        if (timeline) timeline->push_back({role, begin, now()});
      }
    } clock{g.lane() == 0 ? f.timeline() : nullptr, role};
    return work();
  } else {
    return work();
  }
}

}  // namespace moecomm
