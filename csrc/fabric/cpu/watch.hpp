// Watches the processes of peers on this host: a waiter whose deadline has passed asks whether the peer it
// waits for has died. A peer that exits after finishing its part is not an error; only a rank that still
// waits for it reports it.
#pragma once
#include <atomic>
#include <vector>

namespace moecomm {

class Watch {
 public:
  Watch() = default;
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  void add(int rank, int pid);  // no-op for this process
  void mark_lost(int rank) {
    lost_.store(rank + 1, std::memory_order_release);
  }  // a rank thread has left: nobody may wait any more
  int lost(
      int peer) const noexcept;  // the rank that will not do its part any more: `peer` or a marked one, or -1

 private:
  struct Peer {
    int rank;
    int pidfd;
  };
  std::vector<Peer> peers_;
  std::atomic<int> lost_{0};
};

}  // namespace moecomm
