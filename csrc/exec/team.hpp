// A group whose lanes are threads, for tests: ThreadSanitizer then finds a missing sync() or a race between
// lanes that a warp would hide.
#pragma once
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>

#include "exec/group.hpp"

namespace moecomm {

class TeamState {
 public:
  explicit TeamState(int size) : size_(size), barrier_(size) {}
  int size() const { return size_; }
  void sync() { barrier_.arrive_and_wait(); }
  void* value() { return value_; }

 private:
  int size_;
  std::barrier<> barrier_;
  alignas(64) unsigned char value_[256];
};

struct Team {
  TeamState* state;
  int lane_;

  int lane() const { return lane_; }
  int size() const { return state->size(); }
  void sync() const { state->sync(); }
  template <class T>
  T broadcast(T v, int from) const {
    static_assert(sizeof(T) <= 256);
    if (lane_ == from) std::memcpy(state->value(), &v, sizeof(T));
    sync();
    T out;
    std::memcpy(&out, state->value(), sizeof(T));
    sync();  // no lane overwrites the value while another lane still reads it
    return out;
  }
};
static_assert(Group<Team>);

// Runs `role(Team)` on `size` threads and returns lane 0's Status.
template <class Role>
Status run_team(int size, Role&& role) {
  TeamState state(size);
  Status result;
  std::vector<std::jthread> lanes;
  for (int i = 1; i < size; ++i) lanes.emplace_back([&state, &role, i] { role(Team{&state, i}); });
  result = role(Team{&state, 0});
  return result;
}

}  // namespace moecomm
