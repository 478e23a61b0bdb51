// When counters change, for roles that may be ahead of the clock: a signal is entered when it is issued,
// together with the time at which it lands, so a wait knows when it ends without an event for every signal.
#pragma once
#include <cstdint>
#include <vector>

#include "exec/fiber.hpp"

namespace moecomm {

class CounterTimes {
 public:
  // `counters` of every rank, side by side.
  void resize(int ranks, uint64_t counters) {
    per_rank_ = counters;
    last_.resize(uint64_t(ranks) * counters);
  }
  void clear() {
    last_.assign(last_.size(), {});
    older_.clear();
    idle_.clear();
  }

  // The counter grows by `add` at `at`, or with its last change if that is later: signals of one writer are
  // ordered. No role is behind `floor`. True: somebody waits for the counter.
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
  // As far as it has been entered.
  uint64_t value(int rank, uint64_t counter) { return step(rank, counter).value; }
  // When the counter, which is entered with at_least or more, came to at_least.
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
    int32_t older = -1;  // in older_: the change before it, unless every role is past that
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
