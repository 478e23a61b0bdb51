// Concurrent roles of one rank: fibers here, warps in a kernel. Milestone and RoleFibers synchronize them
// inside the rank; the Fabric handles everything between ranks.
#pragma once
#include <memory>
#include <vector>

#include "base/types.hpp"
#include "fabric/sim/net.hpp"

namespace moecomm {

// A number that only grows, and the roles that wait for it. A waiting role may be ahead of the clock, or
// behind the role that opened the milestone.
class Milestone {
 public:
  explicit Milestone(SimNet& net) : net_(net) {}
  // Calls must be in the order of time.
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
  // Returns false only with may_give_up, if there was a deadlock and the wait was given up.
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
  std::vector<Time> times_;  // at n - 1: the time at which n was reached
  std::vector<Waiting> waiting_;
};

class RoleFibers {
 public:
  RoleFibers(SimNet& net, int rank) : net_(net), rank_(rank), puts_(net.size()) {}

  // Starts role(), which returns a Status. Returns the number of the member.
  template <class R>
  int start(const char* name, int channel, R role) {
    const int number = static_cast<int>(members_.size());
    members_.push_back(std::make_unique<Member>(net_));
    net_.start(rank_, name, channel, channel, [this, member = members_.back().get(), role] {
      member->status = role();
      net_.finish_rows();
      stores_ = std::max(stores_, net_.role().stores);
      puts_.add(net_.role().puts);
      member->ended.open(1);
      last_end_ = std::max(last_end_, net_.fibers().now());
      if (++count_ == members_.size() && joiner_ >= 0)
        net_.fibers().wake_follower(joiner_, std::max(since_, last_end_));
    });
    return number;
  }

  // Called by another role of the rank: afterwards the member's writes are visible to it.
  void wait_for(int member) { members_[member]->ended.wait(1); }

  // Waits until all members have ended. Their writes and puts are ordered before the caller's next signal.
  // Returns the first failure, if any.
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
  uint64_t count_ = 0;  // members that have ended
  Time stores_ = 0;     // when their stores are visible
  PutTimes puts_;
  Time last_end_ = 0;
  int joiner_ = -1;  // the fiber in join()
  Time since_ = 0;
};

}  // namespace moecomm
