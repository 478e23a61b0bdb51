// CallLock: lets the calls of a communicator run one at a time. It knows which thread is inside a call,
// because while a rank waits, the language binding may run user code on that thread (a signal handler, the
// garbage collector). A call from that code would deadlock, and objects released there may still be in use.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "fabric/cpu/process.hpp"

namespace moecomm {

class CallLock {
 public:
  // Waits for the running call, which is bounded by its own timeout. The thread must not be inside a call
  // already.
  void lock(const char* op = "a call");
  // As lock(). False: the user interrupted the wait, and the lock is not held.
  bool lock_unless_interrupted(const char* op);
  void unlock();
  // Waits until no other thread is inside a call, or until the user interrupts.
  void wait();

  // False: this is a forked child's copy, which must never be waited for.
  bool is_here() const { return process_.is_here(); }
  // The call that this thread is in; null: none.
  const char* running() const {
    return is_here() && owner_.load(std::memory_order_relaxed) == std::this_thread::get_id() ? op_ : nullptr;
  }

  // Destroys `object`, whose destructor needs this lock: now, or at the end of the running call. Never waits
  // for a call. The caller keeps the owner of this lock alive.
  void destroy(std::shared_ptr<void> object);

  // For a thread that runs no calls and destroys no objects (that of the rail).
  std::timed_mutex& mutex() { return mutex_; }

 private:
  Process process_;
  void enter(const char* op);
  void leave();
  bool any_released();
  std::timed_mutex mutex_;
  std::atomic<std::thread::id> owner_{};
  const char* op_ = nullptr;  // of the owner
  std::mutex released_mutex_;
  std::vector<std::shared_ptr<void>> released_;  // destroyed at the end of the call
};

// Holds the lock for the duration of a call.
class CallScope {
 public:
  CallScope(CallLock& lock, const char* op) : lock_(lock), entered_(lock.lock_unless_interrupted(op)) {}
  ~CallScope() {
    if (entered_) lock_.unlock();
  }
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;
  bool entered() const { return entered_; }  // false: the user interrupted before the call began

 private:
  CallLock& lock_;
  bool entered_;
};

// Makes a T(comm, ...) that is destroyed with its communicator's lock held, whichever thread releases it
// last.
template <class T, class Comm, class... Args>
std::shared_ptr<T> make_owned(std::shared_ptr<Comm> comm, Args&&... args) {
  auto object = std::make_unique<T>(comm, std::forward<Args>(args)...);
  return std::shared_ptr<T>(object.release(), [comm](T* p) mutable {
    std::shared_ptr<Comm> keep = std::move(comm);
    keep->calls().destroy(std::shared_ptr<void>(p, [](void* q) { delete static_cast<T*>(q); }));
  });
}

}  // namespace moecomm
