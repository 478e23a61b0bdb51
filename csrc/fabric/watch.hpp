// Watches the processes of peers on this host: a waiter that has run out of patience asks who died.
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
  void add(int rank, int pid);             // no-op for this process
  void mark_lost(int rank) { lost_.store(rank + 1, std::memory_order_release); }  // rank threads have no pid of their own
  int lost() const noexcept;               // a rank whose process has ended, or -1

 private:
  struct Peer { int rank; int pidfd; };
  std::vector<Peer> peers_;
  std::atomic<int> lost_{0};
};

}  // namespace moecomm
