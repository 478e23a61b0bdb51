// The choice of replicas within a batch of one layer: from logical picks to slots, and how many rows that
// gives each slot. A pure function of its input, so that a rank which knows every rank's picks per expert
// knows every rank's choice.
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

enum class Mode : int32_t { local = 0, even = 1, optimal = 2 };

// One rank's picks.
struct Batch {
  const int64_t* ids = nullptr;  // [tokens, top_k] logical, -1: no pick
  int tokens = 0, top_k = 0;
  const int32_t* counts = nullptr;  // [experts]
};

class Choice {
 public:
  // activate: slots of a rank that may run in a batch, 0: all.
  Choice(const int32_t* physical_to_logical, int slots, int experts, int ranks, int nodes, Mode mode,
         int activate);

  const Replicas& replicas() const { return r_; }
  // Whether the choice depends on the picks of all ranks.
  bool needs_all() const { return mode_ == Mode::optimal || activate_ > 0; }
  // Whether a rank's rows per slot follow from picks per expert. Where it chooses token by token they depend
  // on which picks meet in one.
  bool rows_follow() const { return mode_ != Mode::local; }

  // What is chosen for all ranks together.
  struct Solved {
    int32_t turn = 0;
    std::vector<uint8_t> active;  // [slots], empty: all
    std::vector<int32_t> from,
        to;  // [slots] by replica: the run of its expert's tokens that it takes (optimal)
  };
  // total[experts]: the picks of all ranks, not looked at unless needs_all. turn: another one in every batch,
  // and equal on all ranks where needs_all.
  Solved solve(const int32_t* total, int32_t turn) const;

  // The rows of rank `source` for a slot, by its picks of every expert and those of the ranks before it.
  // Where rows_follow.
  int32_t rows(const Solved& s, int source, const int32_t* before, const int32_t* counts, int slot) const;
  // The slots of this rank's picks, physical[tokens, top_k]; -1 where no replica lives.
  void route(const Solved& s, const Batch& batch, int rank, const int32_t* before, int64_t* physical) const;

 private:
  Replicas r_;
  Mode mode_;
  int activate_;
};

}  // namespace moecomm::balance
