// Process: remembers which process created an object. A forked child inherits the objects of its parent, but
// neither their threads nor their mappings, and it shares the parent's connections. So destructors call
// is_here() and release nothing in a child.
#pragma once
#include <pthread.h>

#include <atomic>

namespace moecomm {

class Process {
 public:
  bool is_here() const { return forks_ == forks(); }

 private:
  // Number of forks between the process that loaded this library and this one. Unlike getpid() it needs no
  // system call, so that a data path can use it.
  static unsigned forks() {
    static std::atomic<unsigned> count{0};
    static const int watched = pthread_atfork(nullptr, nullptr, [] { ++count; });
    return watched == 0 ? count.load(std::memory_order_relaxed) : 0;
  }
  unsigned forks_ = forks();
};

}  // namespace moecomm
