// DecodeFloor: the least cost of a decode step, for benchmarks. It repeats the copies, puts, flags and sums
// of one executed step with addresses that are computed in advance, without routing, checks or Python.
#pragma once
#include <vector>

#include "exec/lane.hpp"
#include "runtime/cpu/decode.hpp"

namespace moecomm {

class DecodeFloor {
 public:
  // Repeats the last step of `decode`, which dispatched x and combined into y. Every rank constructs one for
  // the same step. Call the Decode again only after all ranks have called run() and latency() equally often.
  DecodeFloor(Decode& decode, const char* x, char* y);
  Status run(int steps);
  // Rank 0 and the last rank send each other one message `rounds` times. Other ranks return at once.
  Status latency(int rounds);

 private:
  struct Copy {
    char* to;
    const char* from;
  };
  struct Put {
    int rank;
    uint64_t at;
    const char* from;
    uint64_t bytes;
  };

  template <Fabric<Lane> F>
  Status dispatch(F f);
  template <Fabric<Lane> F>
  Status combine(F f);
  template <Fabric<Lane> F>
  void signal(F f, int rank, bool answer);
  template <Fabric<Lane> F>
  Status wait(F f, int rank, bool answer);

  Decode& decode_;
  PeerMemory& peer_memory_;
  DecodeView view_;
  DecodeTurn turn_;  // a copy that shares its tables and flags with the decode
  char* y_;
  uint64_t row_bytes_;
  std::vector<Copy> staged_, packed_;
  std::vector<Put> messages_, answers_;
  std::vector<TermStore> stores_;  // per token
  std::vector<int> terms_;
};

}  // namespace moecomm
