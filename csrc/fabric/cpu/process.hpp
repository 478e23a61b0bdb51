// Which process an owner belongs to. A forked child inherits the objects of its parent, but neither their
// threads nor their mappings, and it shares the parent's connections: destructors ask first, and in a child
// they leave everything alone.
#pragma once
#include <pthread.h>

#include <atomic>

namespace moecomm {

class Process {
 public:
  bool is_here() const { return forks_ == forks(); }

 private:
  // How many forks lie between the process that loaded this library and this one. A data path can ask for
  // that, unlike for getpid().
  static unsigned forks() {
    static std::atomic<unsigned> count{0};
    static const int watched = pthread_atfork(nullptr, nullptr, [] { ++count; });
    return watched == 0 ? count.load(std::memory_order_relaxed) : 0;
  }
  unsigned forks_ = forks();
};

}  // namespace moecomm
