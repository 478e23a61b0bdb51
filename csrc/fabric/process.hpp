// Which process an owner belongs to. A forked child inherits the objects of its parent, but neither their threads nor their mappings,
// and it shares the parent's connections: destructors ask first, and in a child they leave everything alone.
#pragma once
#include <unistd.h>

namespace moecomm {

class Process {
 public:
  bool is_here() const { return getpid() == pid_; }

 private:
  pid_t pid_ = getpid();
};

}  // namespace moecomm
