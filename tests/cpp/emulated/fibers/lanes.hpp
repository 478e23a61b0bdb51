// Lanes as fibers, all warps of a call on the thread that launched it: whole worlds in milliseconds, without races. Who
// polls gives way to the other lanes, then to other threads, which are other ranks.
#pragma once
#include <sched.h>

#include <deque>
#include <utility>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "exec/fiber.hpp"

namespace emulated {

struct Barrier {
  explicit Barrier(int size = 32) : all(size) {}
  int size() const { return all; }
  int all;
  std::vector<int> waiting = {};   // fibers
};
struct WarpState {
  Barrier barrier;
  uint32_t words[32];
  Engine engine;
};
struct BlockState {
  BlockState(int warps, int squad_warps) : warps(warps), per_squad(squad_warps) {
    for (int i = 0; i < warps / squad_warps; ++i) squads.emplace_back(32 * squad_warps);
  }
  std::deque<WarpState> warps;
  std::deque<Barrier> squads;
  int per_squad;
};
struct Lane { unsigned x; };
// Of the fiber that runs. A fiber stays on its thread, and puts its own back when it goes on.
inline thread_local Lane lane{0};
inline thread_local WarpState* warp = nullptr;
inline thread_local BlockState* block = nullptr;
inline thread_local moecomm::Fibers* fibers = nullptr;

template <class Leave>
void leave(Leave&& leave) {
  const Lane my_lane = lane;
  WarpState* my_warp = warp;
  BlockState* my_block = block;
  leave();
  lane = my_lane;
  warp = my_warp;
  block = my_block;
}

inline Engine& engine() { return warp->engine; }
inline void sync(Barrier& b) {
  if (static_cast<int>(b.waiting.size()) + 1 < b.all) {
    b.waiting.push_back(fibers->current());
    leave([] { fibers->block(); });
    return;
  }
  for (int fiber : std::exchange(b.waiting, {})) fibers->wake(fiber, fibers->now());
}
inline void sync() { sync(warp->barrier); }
inline void pause() {
  sched_yield();
  leave([] { fibers->advance(fibers->now() + 1); });
}

// role(block) on the lanes of a grid.
template <class Role>
void run_grid(int blocks, int warps, int squad_warps, Role&& role) {
  moecomm::Fibers own(nullptr, nullptr);
  std::deque<BlockState> states;
  for (int b = 0; b < blocks; ++b) {
    BlockState& state = states.emplace_back(warps, squad_warps);
    for (int i = 0; i < 32 * warps; ++i)
      own.spawn(0, [&role, &state, b, i] {
        lane.x = static_cast<unsigned>(i);
        warp = &state.warps[i / 32];
        block = &state;
        role(b);
      });
  }
  fibers = &own;
  own.run();
  CHECK(own.alive() == 0);   // else lanes wait for lanes that have left
  fibers = nullptr;
}

}  // namespace emulated
