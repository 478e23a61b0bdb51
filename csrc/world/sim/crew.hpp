// The roles that one rank runs side by side: what warps are in a kernel, fibers here. Milestone and Crew are what
// they meet at inside the rank; what passes between ranks is the Fabric's business.
#pragma once
#include <memory>
#include <vector>

#include "base/types.hpp"
#include "fabric/sim.hpp"

namespace moecomm {

// A number that only grows, and roles that wait for it.
class Milestone {
 public:
  explicit Milestone(SimNet& net) : net_(net) {}
  void open(uint64_t reached) {
    net_.fibers().meet();
    reached_ = reached;
    for (size_t i = 0; i < waiting_.size();) {
      if (waiting_[i].until <= reached_) {
        net_.fibers().wake(waiting_[i].fiber, net_.fibers().now());
        waiting_[i] = waiting_.back();
        waiting_.pop_back();
      } else {
        ++i;
      }
    }
  }
  // False: nobody could go on, and the caller was told to give up (only where it may).
  bool wait(uint64_t until, bool may_give_up = false) {
    net_.fibers().meet();
    if (reached_ >= until) return true;
    const int fiber = net_.fibers().current();
    waiting_.push_back({fiber, until});
    if (may_give_up) net_.park(fiber);
    net_.fibers().block();
    return !may_give_up || net_.unpark(fiber);
  }

 private:
  struct Waiting {
    int fiber;
    uint64_t until;
  };
  SimNet& net_;
  uint64_t reached_ = 0;
  std::vector<Waiting> waiting_;
};

class Crew {
 public:
  Crew(SimNet& net, int rank) : net_(net), rank_(rank), ended_(net) {}

  // `role` returns a Status. Returns the member's number.
  template <class R>
  int start(const char* name, int channel, R role) {
    const int number = static_cast<int>(members_.size());
    members_.push_back(std::make_unique<Member>(net_));
    net_.start(rank_, name, channel, channel, [this, member = members_.back().get(), role] {
      member->status = role();
      net_.settle();
      member->last.stores = net_.role().stores;
      member->last.landed.swap(net_.role().landed);
      member->ended.open(1);
      ended_.open(++count_);   // the meeting in open() keeps the count in the order of time
    });
    return number;
  }

  // From another role of the rank: what the member wrote is seen afterwards.
  void wait_for(int member) { members_[member]->ended.wait(1); }

  // All members have ended: what they wrote and put comes before the caller's next signal. The first failure, if any.
  Status join() {
    ended_.wait(members_.size());
    Role& caller = net_.role();
    Status s;
    for (const auto& m : members_) {
      caller.comes_after(m->last);
      if (s.ok()) s = m->status;
    }
    return s;
  }

 private:
  struct Member {
    explicit Member(SimNet& net) : ended(net) {}
    Milestone ended;
    Status status;
    Role last;   // its stores and puts alone
  };
  SimNet& net_;
  int rank_;
  std::vector<std::unique_ptr<Member>> members_;
  Milestone ended_;
  uint64_t count_ = 0;
};

}  // namespace moecomm
