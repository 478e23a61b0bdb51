// The roles that one rank runs side by side: what warps are in a kernel, fibers here.
#pragma once
#include <deque>
#include <vector>

#include "base/types.hpp"
#include "fabric/sim.hpp"

namespace moecomm {

class Crew {
 public:
  explicit Crew(SimNet& net, int rank) : net_(net), rank_(rank) {}

  // `role` returns a Status. Returns the member's number.
  template <class R>
  int start(const char* name, int channel, R role) {
    const int member = static_cast<int>(members_.size());
    members_.push_back({});
    net_.start(rank_, name, channel, channel, [this, member, role] {
      members_[member].status = role();
      members_[member].stores = net_.role().stores;
      members_[member].done = true;
      ++done_;
      for (size_t i = 0; i < waiting_.size();) {
        if (reached(waiting_[i].member)) {
          net_.fibers().wake(waiting_[i].fiber, net_.fibers().now());
          waiting_[i] = waiting_.back();
          waiting_.pop_back();
        } else {
          ++i;
        }
      }
    });
    return member;
  }

  // From another role of the rank: what the member wrote is seen afterwards.
  void wait_for(int member) {
    if (!reached(member)) {
      waiting_.push_back({net_.fibers().current(), member});
      net_.fibers().block();
    }
  }

  // All members have ended; the caller's next signal releases what they wrote. The first failure, if any.
  Status join() {
    wait_for(kAll);
    Status s;
    for (const Member& m : members_) {
      net_.role().stores = std::max(net_.role().stores, m.stores);
      if (s.ok()) s = m.status;
    }
    return s;
  }

 private:
  static constexpr int kAll = -1;
  struct Member {
    bool done = false;
    Status status;
    Time stores = 0;
  };
  struct Waiting {
    int fiber;
    int member;
  };
  bool reached(int member) const { return member == kAll ? done_ == members_.size() : members_[member].done; }

  SimNet& net_;
  int rank_;
  std::deque<Member> members_;
  std::vector<Waiting> waiting_;
  size_t done_ = 0;
};

}  // namespace moecomm
