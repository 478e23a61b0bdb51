// Exploration: many schedules of one program, each from its own seed, compared with the one without chaos.
#pragma once
#include "runtime/sim/world.hpp"

namespace moecomm {

// What exploring found.
struct Finding {
  bool found = false;
  uint64_t schedules = 0;  // that were run
  uint64_t seed = 0;
  uint64_t perturbations = 0;  // the fewest with which the failure was seen again
  int call = -1, rank = -1;    // where
  std::string what;
  std::vector<LogLine> log;
  std::vector<RoleState> stuck;
};

// Runs `count` schedules of the program, seeds from `first_seed`; stops at the first that deadlocks, fails
// or delivers anything else than the schedule without chaos.
Finding explore(SimCluster& cluster, const std::vector<SimCall>& program, const Mutation& mutation,
                uint64_t first_seed, uint64_t count);

}  // namespace moecomm
