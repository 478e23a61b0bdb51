// The times at which counters change, for roles that may be ahead of the clock. A signal is entered when it
// is issued, with the time at which it arrives. So a wait knows when it ends, without an event for every
// signal.
#pragma once
#include <cstdint>
#include <vector>

#include "exec/fiber.hpp"

namespace moecomm {

class CounterTimes {
 public:
  // counters: number of counters per rank.
  void resize(int ranks, uint64_t counters) {
    per_rank_ = counters;
    last_.resize(uint64_t(ranks) * counters);
  }
  void clear() {
    last_.assign(last_.size(), {});
    older_.clear();
    idle_.clear();
  }

  // Adds `add` to the counter at time `at`, or at the time of its last change if that is later, because the
  // signals of one writer are ordered. No role is earlier than `floor`. Returns whether a role waits for the
  // counter.
  bool enter(int rank, uint64_t counter, uint64_t add, Time at, Time floor) {
    Step& last = step(rank, counter);
    int32_t older = -1;
    if (last.at > floor) {
      at = at > last.at ? at : last.at;
      older = keep(last);
    } else {
      for (int32_t i = last.older; i >= 0; i = older_[i].older) idle_.push_back(i);
    }
    last = {at, last.value + add, older, last.waiters};
    return last.waiters > 0;
  }
  // The value after all entered signals.
  uint64_t value(int rank, uint64_t counter) { return step(rank, counter).value; }
  // The time at which the counter reached at_least. Its entered value must be at_least or more.
  Time reached(int rank, uint64_t counter, uint64_t at_least) {
    const Step* s = &step(rank, counter);
    while (s->older >= 0 && older_[s->older].value >= at_least) s = &older_[s->older];
    return s->at;
  }
  void watch(int rank, uint64_t counter, int waiters) { step(rank, counter).waiters += waiters; }

 private:
  struct Step {
    Time at = 0;
    uint64_t value = 0;
    int32_t older = -1;  // index in older_ of the previous change; -1: none that a role can still see
    int32_t waiters = 0;
  };
  Step& step(int rank, uint64_t counter) { return last_[rank * per_rank_ + counter]; }
  int32_t keep(const Step& s) {
    if (idle_.empty()) {
      older_.push_back(s);
      return static_cast<int32_t>(older_.size() - 1);
    }
    const int32_t i = idle_.back();
    idle_.pop_back();
    older_[i] = s;
    return i;
  }
  uint64_t per_rank_ = 0;
  std::vector<Step> last_;
  std::vector<Step> older_;
  std::vector<int32_t> idle_;
};

}  // namespace moecomm
