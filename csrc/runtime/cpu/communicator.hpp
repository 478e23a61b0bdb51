// Communicator: the ranks of a job, how its nodes are connected, and whether it is broken.
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
#include "runtime/cpu/beats.hpp"
#include "runtime/cpu/call_lock.hpp"

namespace moecomm {

enum class RailKind : int { none = 0, loopback = 1, ucx = 2 };

class PeerMemory;

// Constructed collectively in two steps: every rank constructs it, the caller exchanges the contact()
// strings, and every rank connects.
class Communicator {
 public:
  // threads: the ranks are threads of this process and access each other's memory by pointers. patient: a
  // wait ends only when the peer's heartbeat has stopped for the timeout; all ranks must be processes on this
  // host. previous: the communicator of the previous generation, or null.
  Communicator(Geometry geometry, bool threads, RailKind rail, double timeout_seconds, bool patient = false,
               Communicator* previous = nullptr);
  // May be called on any thread: makes the UCX context of the next generation in advance, for when ranks are
  // lost.
  void prepare_next();

  std::string contact() const;                             // pid, UCX address
  void connect(const std::vector<std::string>& contacts);  // by rank
  // Whether a rank is a process on this host, in this pid namespace. Valid after connect().
  bool on_this_host(int rank) const { return here_[rank]; }
  void open_endpoint(int rank);  // makes a UCX endpoint to it, once; the caller holds calls()

  const Geometry& geometry() const { return geometry_; }
  bool threads() const { return threads_; }
  // Whether memory is not populated at start, because the ranks of a new generation are waiting for it.
  bool populates_lazily() const { return populates_lazily_; }
  // Takes `wanted` bytes of the `limit` that all Buffers together may populate at start, or what is left of
  // it. Without a common limit a model with a Buffer per layer would commit the memory of all layers at once.
  uint64_t take_populated(uint64_t wanted, uint64_t limit);
  void return_populated(uint64_t bytes) { populated_ -= bytes; }
  RailKind rail() const { return rail_; }
  double timeout() const { return timeout_; }
  UcxContext* ucx() { return ucx_.get(); }
  Watch& watch() { return watch_; }
  const std::vector<const Counter*>* beats() const { return beats_ ? &beats_->words() : nullptr; }
  CallLock& calls() { return calls_; }  // one call at a time moves data
  CallState& call() { return call_; }
  // Called for the same calls in the same order on all ranks. memory: PeerMemory::number().
  void begin_call(Verb verb, uint64_t memory) {
    call_.word = waiting_word(verb, memory, ++call_number_);
    call_.announced = false;
  }
  uint64_t calls_begun() const { return call_number_; }  // must not be called during a call
  void skip_calls_to(uint64_t number) {
    call_number_ = number;
    call_.word = 0;
    call_.announced = false;
  }
  void join(PeerMemory* memory);  // words and faults are sent through it from here on
  uint64_t number();              // a number for a PeerMemory that all ranks have: equal on all of them
  void leave(PeerMemory* memory);

  // The first final failure. Later calls report it instead of waiting again.
  void mark_broken(const Status& why);
  Status broken() const;
  // Reports that this rank will make no further calls, because `peer` is lost, so that no rank waits for it.
  void leave_calls(int peer);
  const Waits& waits() const { return waits_; }
  void abort(int rank) { watch_.mark_lost(rank); }  // a rank thread has left by an exception
  // A rank whose process on this host has ended, or ends within the given time; -1: none.
  int ended(int milliseconds) const { return watch_.ended(milliseconds); }
  bool has_ended(int rank, int milliseconds) const { return watch_.has_ended(rank, milliseconds); }

 private:
  Geometry geometry_;
  bool threads_;
  RailKind rail_;
  double timeout_;
  bool populates_lazily_;
  std::atomic<uint64_t> populated_{0};
  CallLock calls_;  // must outlive ucx_, whose thread locks it
  std::mutex spare_mutex_;
  std::unique_ptr<UcxContext> spare_;  // for the next generation
  std::unique_ptr<UcxContext> ucx_;
  std::vector<std::string> ucx_addresses_;  // by rank
  std::vector<bool> here_;                  // by rank: whether it is on this host
  Waits waits_;
  CallState call_;
  uint64_t call_number_ = 0, memory_number_ = 0;
  std::mutex memories_mutex_;
  std::vector<PeerMemory*> memories_;
  Watch watch_;
  std::unique_ptr<Beats> beats_;  // of patient ranks
  mutable std::mutex broken_mutex_;
  Status broken_;
};

}  // namespace moecomm
