// Watch: detects that the process of a peer on this host has ended. A rank asks while it waits for the peer.
// A peer that exits after it has finished its part is not an error; only a rank that still waits for it
// reports it.
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
  // Marks a rank thread that has left: from now on every wait fails.
  void mark_lost(int rank) { lost_.store(rank + 1, std::memory_order_release); }
  // A rank that will not do its part: `peer` or a marked one; -1: none.
  int lost(int peer) const noexcept;
  // Whether the process of this peer has ended or ends within the given time.
  bool has_ended(int peer, int milliseconds) const;
  // A rank whose process has ended or ends within the given time; -1: none.
  int ended(int milliseconds) const;

 private:
  struct Peer {
    int rank;
    int pidfd;  // -1: it had already ended
  };
  std::vector<Peer> peers_;
  std::atomic<int> lost_{0};
};

}  // namespace moecomm
