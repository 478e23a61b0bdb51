// Exploration: runs many schedules of one program, each from its own seed, and compares each with the
// schedule without chaos.
#pragma once
#include "runtime/sim/world.hpp"

namespace moecomm {

// The result of exploration.
struct Finding {
  bool found = false;
  uint64_t schedules = 0;  // number of schedules that were run
  uint64_t seed = 0;
  uint64_t perturbations = 0;  // the least number with which the failure was reproduced
  int call = -1, rank = -1;    // where it failed
  std::string what;
  std::vector<LogLine> log;
  std::vector<RoleState> stuck;
};

// Runs `count` schedules of the program, with seeds from `first_seed` on. Stops at the first that deadlocks,
// fails, or delivers something other than the schedule without chaos.
Finding explore(SimCluster& cluster, const std::vector<SimCall>& program, const Mutation& mutation,
                uint64_t first_seed, uint64_t count);

}  // namespace moecomm
