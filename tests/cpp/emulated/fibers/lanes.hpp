// Lanes as fibers, all warps of a call on the thread that launched it, so that tests with all ranks take
// milliseconds and have no races. A lane that polls yields to the other lanes, then to other threads, which
// are other ranks. Lanes run in the order of their numbers, or with a seed in a random order: blocks and
// lanes start at random times, and any poll or barrier may take a lane long.
#pragma once
#include <sched.h>

#include <deque>
#include <random>
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
  std::vector<int> waiting = {};  // fibers
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
struct Lane {
  unsigned x;
};
// The lane of the running fiber. A fiber stays on its thread and restores its lane when it continues.
inline thread_local Lane lane{0};
inline thread_local WarpState* warp = nullptr;
inline thread_local BlockState* block = nullptr;
inline thread_local moecomm::Fibers* fibers = nullptr;

inline thread_local std::mt19937_64 order;
inline thread_local bool any_order = false;  // of the running grid

// A virtual duration: usually short, sometimes up to `most`.
inline uint64_t some_time(uint64_t most) {
  if (!any_order) return 0;
  const uint64_t drawn = order();
  return drawn % 16 ? drawn % 4 : drawn / 16 % most;
}

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
  for (int fiber : std::exchange(b.waiting, {})) fibers->wake(fiber, fibers->now() + some_time(8));
}
inline void sync() { sync(warp->barrier); }
inline void pause() {
  sched_yield();
  leave([] { fibers->advance(fibers->now() + 1 + some_time(4096)); });
}

// Runs role(block) on the lanes of a grid.
template <class Role>
void run_grid(int blocks, int warps, int squad_warps, Role&& role) {
  moecomm::Fibers own(nullptr, nullptr);
  std::deque<BlockState> states;
  any_order = order_seed != 0;
  if (any_order) order.seed(order_seed.fetch_add(1));
  for (int b = 0; b < blocks; ++b) {
    BlockState& state = states.emplace_back(warps, squad_warps);
    const uint64_t start = any_order ? order() % 8192 : 0;
    for (int i = 0; i < 32 * warps; ++i)
      own.spawn(start + some_time(64), [&role, &state, b, i] {
        lane.x = static_cast<unsigned>(i);
        warp = &state.warps[i / 32];
        block = &state;
        role(b);
      });
  }
  fibers = &own;
  own.run();
  CHECK(own.alive() == 0);  // else lanes wait for lanes that have ended
  fibers = nullptr;
}

}  // namespace emulated
