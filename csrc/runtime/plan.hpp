// Plan: owner of the memory behind a PlanView. Sized for the Buffer's limits once and reused by later
// calls, so that a steady state allocates nothing.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "protocol/views.hpp"

namespace moecomm {

class PlanPool;

// Where a plan's arrays lie in `memory`; returns how many bytes they take.
uint64_t place_plan(const BufferView& b, char* memory, PlanView& view);

class Plan {
 public:
  Plan(const BufferView& b);
  PlanView view;
  std::vector<BlockLayout> target;  // scratch of a call, by local rank
  std::vector<uint64_t> needed;
  std::vector<Offer> offers;
  std::vector<int32_t> base;
  std::vector<int32_t> first;
  const void* owner = nullptr;  // the Buffer it belongs to
  int64_t recorded = -1;        // its number in the Buffer's recording

 private:
  std::unique_ptr<char[]> memory_;
};

class PlanPool : public std::enable_shared_from_this<PlanPool> {
 public:
  explicit PlanPool(const BufferView& b) : view_(b) {}
  std::shared_ptr<Plan> get();  // goes back to the pool with its last reference

 private:
  BufferView view_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Plan>> idle_;
};

}  // namespace moecomm
