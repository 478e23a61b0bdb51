// Plan: owner of the memory of a PlanView. It is sized for the Buffer's limits and reused by later calls, so
// that nothing is allocated in a steady state.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "session/arguments.hpp"

namespace moecomm {

class PlanPool;

// Places a plan's arrays in `memory` and returns their size in bytes.
uint64_t place_plan(const BufferView& b, char* memory, PlanView& view);

class Plan {
 public:
  Plan(const BufferView& b);
  DispatchScratch scratch() {
    verdict = {};
    return {base.data(), first.data(), offers.data(), target.data(), needed.data(), &verdict};
  }

  PlanView view;
  std::vector<BlockLayout> target;  // scratch of a call, by local rank
  std::vector<uint64_t> needed;
  std::vector<Offer> offers;
  std::vector<int32_t> base;
  std::vector<int32_t> first;
  Verdict verdict{};
  const void* owner = nullptr;  // the Buffer it belongs to
  int64_t recorded = -1;        // its number in the Buffer's recording

 private:
  std::unique_ptr<char[]> memory_;
};

class PlanPool : public std::enable_shared_from_this<PlanPool> {
 public:
  explicit PlanPool(const BufferView& b) : view_(b) {}
  std::shared_ptr<Plan> get();  // the plan returns to the pool with its last reference

 private:
  BufferView view_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Plan>> idle_;
};

}  // namespace moecomm
