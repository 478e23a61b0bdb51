// Copies of one layer's hot experts for one batch: which ranks take them, so that no rank is above a level.
#pragma once
#include <cstdint>
#include <vector>

namespace moecomm::balance {

struct PrefetchShape {
  int32_t experts = 0;
  int32_t ranks = 0;
  int32_t nodes = 1;
  int32_t slots = 0;  // of a rank
  int32_t spare = 0;  // its last slots, which copies may take; the others hold every expert once
};

class Prefetch {
 public:
  // load[experts] finite and >= 0; table[ranks * slots] is the placement that is in force. Both must outlive
  // this object.
  Prefetch(const PrefetchShape& shape, const double* load, const int32_t* table);

  // Writes the table [ranks * slots] with the lowest level that `most` moved copies reach (-1: any number),
  // and returns how many it moves. A pure function of its input. Every loop is bounded.
  int64_t lowest(int64_t most, int32_t* table) const;

 private:
  using Copies = std::vector<std::vector<int32_t>>;  // experts that every rank takes

  bool reach(double level, int64_t most, Copies& copies) const;
  int roomiest(int donor, int expert, double amount, double level, const std::vector<double>& room,
               const std::vector<int32_t>& free) const;
  int64_t place(const Copies& copies, int32_t* table) const;
  const int32_t* slots_of(int rank) const { return table_ + int64_t{rank} * s_.slots; }
  bool holds(int rank, int expert) const { return held_[int64_t{rank} * s_.experts + expert] != 0; }

  PrefetchShape s_;
  const double* load_;
  const int32_t* table_;
  std::vector<double> own_;      // [ranks] load of the experts whose home it is
  std::vector<int32_t> donors_;  // ranks, the most loaded first
  std::vector<uint8_t> held_;    // [ranks, experts] the copies that are in spare slots already
  double mean_ = 0, tiny_ = 0;
};

}  // namespace moecomm::balance
