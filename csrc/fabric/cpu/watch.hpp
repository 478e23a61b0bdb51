// Watches the processes of peers on this host: a waiter that has run out of patience asks whether the one it
// waits for has died. A rank that ended after doing its part is nobody's business: who depends on it reports
// it.
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
