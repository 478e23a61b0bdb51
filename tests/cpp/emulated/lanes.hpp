// Lanes as threads: races between them are real, and ThreadSanitizer detects them. fibers/lanes.hpp has lanes
// as fibers.
#pragma once
#include <deque>
#include <thread>
#include <vector>

#include "engine.hpp"
#include "exec/team.hpp"

namespace emulated {

struct WarpState {
  moecomm::TeamState team{32};
  uint32_t words[32];
};
// Each barrier of a block is for the warps of one squad; all squads have the same size.
struct BlockState {
  BlockState(int warps, int squad_warps) : warps(warps) {
    for (int i = 0; i < warps / squad_warps; ++i) squads.emplace_back(32 * squad_warps);
    per_squad = squad_warps;
  }
  std::deque<WarpState> warps;
  std::deque<moecomm::TeamState> squads;
  int per_squad;
};
struct Lane {
  unsigned x;
};
inline thread_local Lane lane{0};
inline thread_local WarpState* warp = nullptr;
inline thread_local BlockState* block = nullptr;
inline thread_local Engine own_engine;  // lane 0's

inline Engine& engine() { return own_engine; }
inline void sync() { warp->team.sync(); }
inline void sync(moecomm::TeamState& squad) { squad.sync(); }
inline void pause() { std::this_thread::yield(); }  // there are many more lanes than cores

// Runs role() on the threads of a block.
template <class Role>
void run_block(int warps, int squad_warps, Role&& role) {
  BlockState state(warps, squad_warps);
  std::vector<std::jthread> threads;
  for (int i = 0; i < 32 * warps; ++i)
    threads.emplace_back([&, i] {
      lane.x = static_cast<unsigned>(i);
      warp = &state.warps[i / 32];
      block = &state;
      role();
    });
}
template <class Role>
void run_warp(Role&& role) {
  run_block(1, 1, role);
}

}  // namespace emulated
