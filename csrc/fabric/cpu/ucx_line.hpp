// The way to one peer's region: puts, and signals that must not overtake them.
//
// UCX orders the puts of an endpoint only by a fence, and its fence may wait for the peer without a bound. So
// a signal that has puts before it goes behind a flush of the endpoint, which is asynchronous: when the flush
// is complete, the signal is put. Signals that come meanwhile wait for the next flush together. A signal is
// the counter's new value (UCX's tcp transport has no atomics under peer error handling, and a counter has
// one writer).
//
// All calls and callbacks under the communicator's lock. Shared: it outlives its region where UCX still holds
// it.
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
  void signal(uint64_t counter, uint64_t add) noexcept;
  // True when all of it is complete at the peer; starts what is missing for that.
  bool settle() noexcept;
  void close() noexcept;  // gives the key back; nothing may be put any more
  int rank() const { return rank_; }

 private:
  struct Cell {
    UcxLine* line;
    uint64_t value;
  };  // the source of a signal's put
  using Signals = std::vector<std::pair<uint64_t, uint64_t>>;  // (counter, value)
  void flush() noexcept;
  void flushed(bool ok) noexcept;
  void send(uint64_t counter, uint64_t value) noexcept;
  bool open() const noexcept { return rkey_ && context_.endpoint(rank_); }

  UcxContext& context_;
  int rank_;
  uint64_t address_;
  ucp_rkey_h rkey_;
  std::vector<uint64_t> signalled_;  // value of each of the peer's counters that this rank writes
  bool issued_ = false;              // something was issued that no flush covers yet
  bool flushing_ = false;
  Signals behind_;   // the flush under way
  Signals waiting_;  // for the next one
  std::vector<std::unique_ptr<Cell>> cells_;
  std::vector<Cell*> idle_;
};

}  // namespace moecomm
