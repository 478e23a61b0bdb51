// The roles that one rank runs side by side: what warps are in a kernel, fibers here. Milestone and Crew are
// what they meet at inside the rank; what passes between ranks is the Fabric's business.
#pragma once
#include <memory>
#include <vector>

#include "base/types.hpp"
#include "fabric/sim/net.hpp"

namespace moecomm {

// A number that only grows, and roles that wait for it. They may be ahead of the clock, or behind whoever
// opened it.
class Milestone {
 public:
  explicit Milestone(SimNet& net) : net_(net) {}
  // Calls come in the order of time.
  void open(uint64_t reached) {
    const Time now = net_.fibers().now();
    if (times_.size() < reached) times_.resize(reached, now);
    for (size_t i = 0; i < waiting_.size();) {
      const Waiting& w = waiting_[i];
      if (w.until <= reached) {
        net_.fibers().wake_follower(w.fiber, std::max(w.since, now));
        waiting_[i] = waiting_.back();
        waiting_.pop_back();
      } else {
        ++i;
      }
    }
  }
  // False: nobody could go on, and the caller was told to give up (only where it may).
  bool wait(uint64_t until, bool may_give_up = false) {
    Fibers& fibers = net_.fibers();
    if (times_.size() >= until) {
      if (until > 0) fibers.advance(times_[until - 1]);
      return true;
    }
    const int fiber = fibers.current();
    waiting_.push_back({fiber, until, fibers.now()});
    if (may_give_up) net_.park(fiber);
    fibers.block();
    return !may_give_up || net_.unpark(fiber);
  }

 private:
  struct Waiting {
    int fiber;
    uint64_t until;
    Time since;
  };
  SimNet& net_;
  std::vector<Time> times_;  // when n was reached, at n - 1
  std::vector<Waiting> waiting_;
};

class Crew {
 public:
  Crew(SimNet& net, int rank) : net_(net), rank_(rank), puts_(net.size()) {}

  // `role` returns a Status. Returns the member's number.
  template <class R>
  int start(const char* name, int channel, R role) {
    const int number = static_cast<int>(members_.size());
    members_.push_back(std::make_unique<Member>(net_));
    net_.start(rank_, name, channel, channel, [this, member = members_.back().get(), role] {
      member->status = role();
      net_.settle();
      stores_ = std::max(stores_, net_.role().stores);
      puts_.add(net_.role().puts);
      member->ended.open(1);
      last_end_ = std::max(last_end_, net_.fibers().now());
      if (++count_ == members_.size() && joiner_ >= 0)
        net_.fibers().wake_follower(joiner_, std::max(since_, last_end_));
    });
    return number;
  }

  // From another role of the rank: what the member wrote is seen afterwards.
  void wait_for(int member) { members_[member]->ended.wait(1); }

  // All members have ended: what they wrote and put comes before the caller's next signal. The first failure,
  // if any.
  Status join() {
    Fibers& fibers = net_.fibers();
    if (count_ == members_.size()) {
      fibers.advance(last_end_);
    } else {
      joiner_ = fibers.current();
      since_ = fibers.now();
      fibers.block();
    }
    net_.role().comes_after(stores_, puts_);
    Status s;
    for (const auto& m : members_)
      if (s.ok()) s = m->status;
    return s;
  }

 private:
  struct Member {
    explicit Member(SimNet& net) : ended(net) {}
    Milestone ended;
    Status status;
  };
  SimNet& net_;
  int rank_;
  std::vector<std::unique_ptr<Member>> members_;
  uint64_t count_ = 0;  // that have ended
  Time stores_ = 0;     // theirs
  PutTimes puts_;
  Time last_end_ = 0;
  int joiner_ = -1;  // a fiber
  Time since_ = 0;
};

}  // namespace moecomm
