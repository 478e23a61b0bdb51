// ReplicaChooser: chooses the replicas of a batch by the counts of all ranks, for run_dispatch and
// run_exchange.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "balance/replica_policy.hpp"
#include "protocol/views.hpp"
#include "session/calls.hpp"

namespace moecomm {

// Fills the count blocks of the exchange with this rank's picks of logical experts, the same block for every
// node (DispatchArgs::logical_blocks).
inline void fill_logical_blocks(const BufferView& view, const DispatchCall& call,
                                std::vector<int32_t>& logical_blocks) {
  const int nodes = view.geometry.nodes();
  logical_blocks.assign(static_cast<size_t>(nodes) * view.count.ints, 0);
  for (int n = 0; n < nodes; ++n)
    std::copy(call.counted, call.counted + call.policy->replicas().experts,
              logical_blocks.data() + n * view.count.ints + view.count.picks);
}

class ReplicaChooser {
 public:
  // rotation: see ReplicaPolicy::solve(). It must be equal on all ranks, even if calls were refused before.
  ReplicaChooser(const BufferView& view, const DispatchCall& call, uint64_t rotation)
      : rows_follow(call.policy->rows_follow() && call.shape.layout == RowLayout::expert),
        view_(view),
        choice_(*call.policy),
        call_(call),
        rotation_(static_cast<int32_t>(rotation & 0xffffff)),
        experts_(choice_.replicas().experts) {}

  template <class Picks>
  void choose(Picks picks_of) {
    const int me = view_.geometry.rank, size = view_.geometry.size;
    before_.resize(static_cast<size_t>(size + 1) * experts_);
    for (int s = 0; s < size; ++s)
      std::transform(before(s), before(s) + experts_, picks_of(s), before(s + 1), std::plus<>());
    solved_ = choice_.solve(before(size), rotation_);
    std::transform(before(me + 1), before(me + 1) + experts_, before(me), call_.counted, std::minus<>());
    choice_.route(solved_, {call_.ids64, call_.tokens, view_.shape.top_k, call_.counted}, me, before(me),
                  call_.slots);
    std::copy(before(size), before(size) + experts_, call_.counted);
  }

  // Computes the rows of a source for every expert slot of this rank's node.
  void rows_to(int source, int32_t* rows) {
    const int n = view_.experts_per_node(), first = view_.geometry.node() * n;
    counts_.resize(experts_);
    std::transform(before(source + 1), before(source + 1) + experts_, before(source), counts_.begin(),
                   std::minus<>());
    for (int i = 0; i < n; ++i)
      rows[i] = choice_.rows(solved_, source, before(source), counts_.data(), first + i);
  }

  const bool rows_follow;

 private:
  int32_t* before(int source) { return before_.data() + static_cast<size_t>(source) * experts_; }

  const BufferView& view_;
  const balance::ReplicaPolicy& choice_;
  const DispatchCall& call_;
  int32_t rotation_;
  int experts_;
  std::vector<int32_t> before_;  // [size + 1, experts] picks of the ranks before each rank
  std::vector<int32_t> counts_;
  balance::ReplicaPolicy::Solved solved_;
};

}  // namespace moecomm
