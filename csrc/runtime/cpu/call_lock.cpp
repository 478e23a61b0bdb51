#include "runtime/cpu/call_lock.hpp"

#include <chrono>
#include <utility>

#include "fabric/cpu/host_state.hpp"

namespace moecomm {

void CallLock::enter(const char* op) {
  op_ = op;
  owner_.store(std::this_thread::get_id());
}

void CallLock::lock(const char* op) {
  mutex_.lock();
  enter(op);
}

bool CallLock::lock_unless_interrupted(const char* op) {
  while (!mutex_.try_lock() && !mutex_.try_lock_for(std::chrono::milliseconds(5)))
    if (interrupted && interrupted()) return false;
  enter(op);
  return true;
}

bool CallLock::any_released() {
  std::lock_guard lock(released_mutex_);
  return !released_.empty();
}

// Destroys the objects that were released during the call, while the lock is held, and unlocks.
void CallLock::leave() {
  for (;;) {
    std::vector<std::shared_ptr<void>> now;
    {
      std::lock_guard lock(released_mutex_);
      now.swap(released_);
    }
    if (now.empty()) break;
  }
  owner_.store(std::thread::id());
  mutex_.unlock();
}

// A thread that releases an object while this thread owns the lock leaves the object to this thread. So check
// again after unlocking.
void CallLock::unlock() {
  leave();
  while (any_released() && mutex_.try_lock()) {
    enter("the end of a call");
    leave();
  }
}

void CallLock::wait() {
  if (is_here() && !running() && lock_unless_interrupted("close")) unlock();
}

void CallLock::destroy(std::shared_ptr<void> object) {
  if (!is_here()) return;  // a forked child: the owner of the lock may not exist here
  {
    std::lock_guard lock(released_mutex_);
    released_.push_back(std::move(object));
  }
  while (!mutex_.try_lock()) {
    if (owner_.load() != std::thread::id()) return;  // the end of that call destroys it
    std::this_thread::yield();                       // the thread of the rail holds the lock briefly
  }
  enter("the end of a call");
  unlock();
}

}  // namespace moecomm
