// UcxLine: the connection to one peer's region. It sends puts, and signals that must not overtake them.
//
// UCX orders the puts of an endpoint only by a fence, and its fence may wait for the peer without a bound. So
// a signal with puts before it first starts a flush of the endpoint, which is asynchronous, and is put when
// the flush is complete. Signals that are issued during the flush wait together for the next one. A signal is
// put as the counter's new value, since UCX's tcp transport has no atomics with peer error handling, and
// since a counter has only one writer.
//
// All calls and callbacks hold the communicator's lock. Lines are shared, because a line outlives its region
// while UCX still uses it.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "fabric/cpu/ucx.hpp"

namespace moecomm {

class UcxLine {
 public:
  UcxLine(UcxContext& context, int rank, uint64_t address, ucp_rkey_h rkey, uint64_t counter_bytes);
  UcxLine(const UcxLine&) = delete;
  UcxLine& operator=(const UcxLine&) = delete;

  void put(uint64_t offset, const void* src, uint64_t bytes) noexcept;
  void get(void* to, uint64_t offset, uint64_t bytes) noexcept;
  void signal(uint64_t counter, uint64_t add) noexcept;
  int64_t in_flight() const noexcept { return open() ? in_flight_ : 0; }  // puts and gets of callers' memory
  // Whether all puts and signals are complete at the peer. Starts a flush if one is needed.
  bool flush_poll() noexcept;
  void close() noexcept;  // releases the key; no put may follow
  int rank() const { return rank_; }

 private:
  struct Cell {
    UcxLine* line;
    uint64_t value;
  };  // the source of a signal's put
  void started(void* request) noexcept;  // request: the result of a put or get
  static void completed(void* request, void* line) noexcept;
  using Signals = std::vector<std::pair<uint64_t, uint64_t>>;  // (counter, value)
  void flush() noexcept;
  void flushed(bool ok) noexcept;
  void send(uint64_t counter, uint64_t value) noexcept;
  bool open() const noexcept { return rkey_ && context_.endpoint(rank_); }

  UcxContext& context_;
  int rank_;
  uint64_t address_;
  ucp_rkey_h rkey_;
  std::vector<uint64_t> signaled_;  // value of each of the peer's counters that this rank writes
  bool issued_ = false;             // an operation was issued that no flush covers yet
  bool flushing_ = false;
  int64_t in_flight_ = 0;
  Signals behind_;   // wait for the current flush
  Signals waiting_;  // wait for the next flush
  std::vector<std::unique_ptr<Cell>> cells_;
  std::vector<Cell*> idle_;
};

}  // namespace moecomm
