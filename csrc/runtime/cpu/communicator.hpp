// Communicator: who is in the world, how the nodes are joined, and whether it is still whole.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "fabric/cpu/host_state.hpp"
#include "fabric/cpu/ucx.hpp"
#include "fabric/cpu/watch.hpp"
#include "runtime/cpu/call_lock.hpp"

namespace moecomm {

enum class RailKind : int { none = 0, loopback = 1, ucx = 2 };

class Reach;

// Collective in two steps: every rank constructs, the caller exchanges card() strings, every rank connects.
class Communicator {
 public:
  // threads: the ranks share this process, their memory is reached by pointer.
  Communicator(Geometry geometry, bool threads, RailKind rail, double timeout_seconds);

  std::string card() const;                             // pid, UCX address
  void connect(const std::vector<std::string>& cards);  // by rank
  void reach(int rank);  // a UCX endpoint to it, once; the caller holds calls()

  const Geometry& geometry() const { return geometry_; }
  bool threads() const { return threads_; }
  RailKind rail() const { return rail_; }
  double timeout() const { return timeout_; }
  UcxContext* ucx() { return ucx_.get(); }
  Watch& watch() { return watch_; }
  CallLock& calls() { return calls_; }  // one call at a time moves data
  CallState& call() { return call_; }
  void begin_call(Verb verb,
                  uint64_t memory) {  // the same ones in the same order on all ranks; memory: Reach::number
    call_.word = waiting_word(verb, memory, ++call_number_);
    call_.told = false;
  }
  uint64_t join(Reach* reach);  // when all ranks have it: its number, equal on all of them
  void leave(Reach* reach);

  // The first failure is final: later calls say what it was instead of waiting again.
  void mark_broken(const Status& why);
  Status broken() const;
  void abort(int rank) { watch_.mark_lost(rank); }  // a rank thread has left by an exception

 private:
  Geometry geometry_;
  bool threads_;
  RailKind rail_;
  double timeout_;
  CallLock calls_;  // outlives ucx_, whose thread takes it
  std::unique_ptr<UcxContext> ucx_;
  std::vector<std::string> ucx_addresses_;  // by rank
  CallState call_;
  uint64_t call_number_ = 0, reach_number_ = 0;
  std::mutex reaches_mutex_;
  std::vector<Reach*> reaches_;
  Watch watch_;
  mutable std::mutex broken_mutex_;
  Status broken_;
};

}  // namespace moecomm
