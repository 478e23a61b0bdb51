#include "fabric/cpu/watch.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace moecomm {

// A pidfd stays bound to its process, so a later process with the same number cannot be mistaken for it.
void Watch::add(int rank, int pid) {
  if (pid == static_cast<int>(getpid())) return;
  const int fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (fd >= 0 || errno == ESRCH) peers_.push_back({rank, fd});
}

Watch::~Watch() {
  for (const Peer& p : peers_)
    if (p.pidfd >= 0) close(p.pidfd);
}

int Watch::lost(int peer) const noexcept {
  if (const int marked = lost_.load(std::memory_order_acquire)) return marked - 1;
  for (const Peer& p : peers_) {
    if (p.rank != peer) continue;
    pollfd fd{p.pidfd, POLLIN, 0};
    if (p.pidfd < 0 || poll(&fd, 1, 0) > 0) return p.rank;
  }
  return -1;
}

bool Watch::has_ended(int peer, int milliseconds) const {
  for (const Peer& p : peers_) {
    if (p.rank != peer) continue;
    pollfd fd{p.pidfd, POLLIN, 0};
    return p.pidfd < 0 || poll(&fd, 1, milliseconds) > 0;
  }
  return false;
}

int Watch::ended(int milliseconds) const {
  std::vector<pollfd> fds;
  for (const Peer& p : peers_) {
    if (p.pidfd < 0) return p.rank;
    fds.push_back({p.pidfd, POLLIN, 0});
  }
  poll(fds.data(), fds.size(), milliseconds);
  for (size_t i = 0; i < fds.size(); ++i)
    if (fds[i].revents) return peers_[i].rank;
  return -1;
}

}  // namespace moecomm
