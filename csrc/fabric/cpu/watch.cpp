#include "fabric/cpu/watch.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace moecomm {

// A pidfd stays bound to its process: no confusion with a later process of the same number.
void Watch::add(int rank, int pid) {
  if (pid == static_cast<int>(getpid())) return;
  const int fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (fd >= 0) peers_.push_back({rank, fd});
}

Watch::~Watch() {
  for (const Peer& p : peers_) close(p.pidfd);
}

int Watch::lost(int peer) const noexcept {
  if (const int marked = lost_.load(std::memory_order_acquire)) return marked - 1;
  for (const Peer& p : peers_) {
    if (p.rank != peer) continue;
    pollfd fd{p.pidfd, POLLIN, 0};
    if (poll(&fd, 1, 0) > 0) return p.rank;
  }
  return -1;
}

}  // namespace moecomm
