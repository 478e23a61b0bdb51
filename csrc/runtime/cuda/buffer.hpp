// DeviceBuffer: a rank's windows on a GPU, and its calls as kernels on the caller's stream. Kernels see views
// of what this object owns; they are valid while it lives.
#pragma once
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "runtime/calls.hpp"
#include "runtime/cuda/window.hpp"
#include "runtime/plan.hpp"

namespace moecomm::cuda {

// A plan in device memory, with the scratch of the call that makes it.
struct DevicePlan {
  PlanView view;
  int32_t* apart = nullptr;
  int32_t* base = nullptr;
  int32_t* first = nullptr;
  Offer* offers = nullptr;
  BlockLayout* target = nullptr;
  uint64_t* needed = nullptr;
  Verdict* verdict = nullptr;
  RowsBoard* boards = nullptr;
  int64_t num_rows = 0;  // as the host knows it: received, or the capacity
  const void* owner = nullptr;
  std::shared_ptr<DeviceMemory> memory;
};

// What captured calls use. A graph may be replayed after the last handle and tensor of its calls are gone,
// and writes there again: until clear() nobody else gets these plans and pieces.
class Captured {
 public:
  void keep(const std::shared_ptr<DevicePlan>& plan,
            std::initializer_list<std::shared_ptr<DeviceBlock>> blocks) {
    plans_.insert(plan);
    blocks_.insert(blocks);
  }
  void clear() {
    plans_.clear();
    blocks_.clear();
  }
  uint64_t bytes() const {  // of the arena
    uint64_t sum = 0;
    for (const auto& b : blocks_) sum += b->bytes();
    return sum;
  }

 private:
  std::set<std::shared_ptr<DevicePlan>> plans_;
  std::set<std::shared_ptr<DeviceBlock>> blocks_;
};

using DeviceDispatchCall = OnStream<DispatchCall>;
using DeviceCombineCall = OnStream<CombineCall>;

class DeviceBuffer {
 public:
  DeviceBuffer(Geometry geometry, Shape shape, bool check, int device, std::shared_ptr<DeviceReach> reach,
               Spread spread, double timeout_seconds);
  ~DeviceBuffer();
  static uint64_t bytes(const Geometry& g, const Shape& s);

  // Collective: exchange cards, connect, meet in a barrier before the first call.
  std::string card() const;
  void connect(const std::vector<std::string>& cards);

  std::shared_ptr<DevicePlan> new_plan();
  // Enqueues on the call's stream. Without a capacity it also waits until the number of rows is known; with
  // one it returns at once, and a failure is found by a later call or by fault(). What a captured call uses
  // is kept until release_captured().
  Status dispatch(const DeviceDispatchCall& call, const std::shared_ptr<DevicePlan>& plan,
                  std::shared_ptr<DeviceBlock>& out, std::shared_ptr<DeviceBlock>& output);
  Status combine(const DeviceCombineCall& call, const std::shared_ptr<DevicePlan>& plan,
                 const std::shared_ptr<DeviceBlock>& output);
  uint64_t captured_bytes() const { return captured_.bytes(); }
  void release_captured() { captured_.clear(); }
  // In the place of a combine: this rank takes no part but to tell the others. (A dispatch says it in its
  // call.) Waits for the stream.
  Status refuse_combine(Why why, DevicePlan& plan, void* stream);
  // What kernels have reported so far. A final failure stays; others are forgotten once told.
  Status fault();
  Counters take_counters();                                     // waits for the device; and resets
  const Counters* counters() const { return links_.counters; }  // in device memory; kernels add to them

  const Arena& arena() const { return *arena_; }
  const DeviceWindow& window() const { return *window_; }  // which peers read
  const Shape& shape() const { return view_.shape; }
  const Spread& spread() const { return spread_; }

 private:
  Call begin(void* stream);
  Status wait_placed(uint64_t ticket, void* stream);
  Status late_fault(void* stream);
  Status settled(void* stream);
  std::unique_ptr<DevicePlan> make_plan();
  Placed& placed() const { return *Offset<Placed>{}.in(pinned_->data()); }
  FaultRecord* records() const { return Offset<FaultRecord>{64}.in(pinned_->data()); }

  BufferView view_;
  int device_;
  std::shared_ptr<DeviceReach> reach_;
  const Kernels& kernels_;
  Spread spread_;
  double timeout_;
  std::shared_ptr<DeviceWindow> window_;
  std::shared_ptr<DeviceMemory> state_;
  std::shared_ptr<Arena> arena_;
  std::unique_ptr<Pinned> pinned_;
  DeviceLinks links_;
  Book* book_ = nullptr;
  uint64_t* gates_ = nullptr;  // the gates, then the three words that DeviceLinks::failed names
  uint64_t ticket_ = 0;
  uint64_t calls_ = 0, staged_rows_ = 0;  // since take_counters; what graphs replay is not among them
  Status broken_;
  Captured captured_;

  struct Pool {
    std::mutex mutex;
    std::vector<std::unique_ptr<DevicePlan>> idle;
  };
  std::shared_ptr<Pool> pool_ = std::make_shared<Pool>();
};

}  // namespace moecomm::cuda
