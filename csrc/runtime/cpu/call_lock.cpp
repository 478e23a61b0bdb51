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

// Destroys what was released meanwhile: destructors of these objects expect the lock.
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

// Who releases an object while this thread is the owner leaves it to this thread, which looks once more after
// it has let go.
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
  if (!is_here()) return;  // who held the lock is not here
  {
    std::lock_guard lock(released_mutex_);
    released_.push_back(std::move(object));
  }
  while (!mutex_.try_lock()) {
    if (owner_.load() != std::thread::id()) return;  // its end destroys
    std::this_thread::yield();                       // the rail's thread, for a moment
  }
  enter("the end of a call");
  unlock();
}

}  // namespace moecomm
