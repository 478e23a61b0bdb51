// FirstPhase: what other threads may wait for while a dispatch runs: its counts, before its rows are here.
#pragma once
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace moecomm {

class FirstPhase {
 public:
  enum class State { running, placed, over };

  // By the thread of the call. A call that is repeated begins again.
  void begin() { become(State::running); }
  // Every row has its place: who waits sees what was written before.
  void placed() { become(State::placed); }
  // The call has ended, with or without places. No waiter waits any longer.
  void end() {
    std::unique_lock lock(mutex_);
    if (state_ == State::placed) return;
    lock.unlock();
    become(State::over);
  }
  // Any thread. `running` after this time, which bounds how late a caller attends to its signals.
  State wait_for(int milliseconds) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                      [&] { return state_ != State::running; });
    return state_;
  }

 private:
  void become(State state) {
    {
      std::lock_guard lock(mutex_);
      state_ = state;
    }
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  State state_ = State::running;
};

}  // namespace moecomm
