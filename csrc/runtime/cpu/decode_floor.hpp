// DecodeFloor: what a decode step costs at least. For benchmarks: the copies, puts, flags and sums of one
// step that was made, again and again, with every address known before: no routing, no checks, no Python.
#pragma once
#include <vector>

#include "runtime/cpu/decode.hpp"

namespace moecomm {

class DecodeFloor {
 public:
  // Of the decode's last step, whose rows went from x and came back to y; every rank makes one of the same
  // step. Then the Decode is given other calls only after run() and latency() were called equally often on
  // all ranks.
  DecodeFloor(Decode& decode, const char* x, char* y);
  Status run(int steps);
  // Rank 0 and the last rank send each other one message `rounds` times; the others return at once.
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

  template <class F>
  Status dispatch(F f);
  template <class F>
  Status combine(F f);
  template <class F>
  void signal(F f, int rank, bool answer);
  template <class F>
  Status wait(F f, int rank, bool answer);

  Decode& decode_;
  Reach& reach_;
  DecodeView view_;
  DecodeTurn turn_;  // its flags are the decode's own
  char* y_;
  uint64_t row_bytes_;
  std::vector<Copy> staged_, packed_;
  std::vector<Put> messages_, answers_;
  std::vector<TermStore> stores_;  // per token
  std::vector<int> terms_;
};

}  // namespace moecomm
