// DeviceBuffer: a rank's memory on a GPU, and its calls as kernels on the caller's stream. Kernels get views
// of the memory that this object owns; the views are valid as long as the object.
#pragma once
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "runtime/cuda/calls.hpp"
#include "runtime/cuda/window.hpp"
#include "runtime/plan.hpp"
#include "session/calls.hpp"

namespace moecomm::cuda {

// A plan in device memory, with the scratch of the call that makes it.
struct DevicePlan {
  PlanView view;
  DispatchScratch scratch{};
  int32_t* channel_counts = nullptr;
  RowsBoard* boards = nullptr;
  int64_t num_rows = 0;  // as known to the host: the received rows, or the capacity
  const void* owner = nullptr;
  std::shared_ptr<DeviceMemory> memory;
};

// Keeps the plans and blocks of captured calls. A graph may be replayed, and then writes to them again, after
// the last handle and tensor of its calls are freed. So no other call gets them until clear().
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
  DeviceBuffer(Geometry geometry, Shape shape, bool check, int device,
               std::shared_ptr<PeerAccess> peer_access, std::shared_ptr<DeviceCalls> calls, Spread spread,
               double timeout_seconds);
  ~DeviceBuffer();
  static uint64_t bytes(const Geometry& g, const Shape& s);

  // Collective: exchange contacts, connect(), then a barrier before the first call.
  std::string contact() const;
  void connect(const std::vector<std::string>& contacts);

  std::shared_ptr<DevicePlan> new_plan();
  // Enqueues a kernel on the call's stream. Without a capacity it also waits until the number of rows is
  // known. With a capacity it returns at once, and ended() or a later call reports a failure. The memory of a
  // captured call is kept until release_captured().
  Status dispatch(const DeviceDispatchCall& call, const std::shared_ptr<DevicePlan>& plan,
                  std::shared_ptr<DeviceBlock>& out, std::shared_ptr<DeviceBlock>& output);
  Status combine(const DeviceCombineCall& call, const std::shared_ptr<DevicePlan>& plan,
                 const std::shared_ptr<DeviceBlock>& output);
  uint64_t captured_bytes() const { return captured_.bytes(); }
  void release_captured() { captured_.clear(); }
  // Replaces a combine: this rank only announces that it refuses its part. (For a dispatch: Tokens::refused.)
  // Waits for the stream.
  Status refuse_combine(Why why, DevicePlan& plan, void* stream);
  Status fault() { return calls_->fault(refusals()); }
  // The same, for calls that no host waited for.
  Status late_fault() { return calls_->late_fault(refusals(), false); }
  // After a call that no host waits for: the failure that kernels have reported so far, unless the next call
  // reports it.
  Status ended() { return calls_->late_fault(refusals(), true); }
  Counters take_counters();                                     // waits for the device and resets them
  const Counters* counters() const { return links_.counters; }  // in device memory; kernels add to them

  const Arena& arena() const { return *arena_; }
  const DeviceWindow& window() const { return *window_; }
  const Shape& shape() const { return view_.shape; }
  const Spread& spread() const { return spread_; }

 private:
  Call begin(Verb verb, bool awaited);
  Status start(void* stream, const std::function<void()>& launch);
  Status wait_placed(uint64_t ticket, void* stream);
  Status await_refusal(Why why, void* stream);
  std::unique_ptr<DevicePlan> make_plan();
  Placed& placed() const { return *Offset<Placed>{}.in(pinned_->data()); }
  FaultRecord* refusals() const { return Offset<FaultRecord>{64}.in(pinned_->data()); }

  BufferView view_;
  int device_;
  std::shared_ptr<PeerAccess> peer_access_;
  std::shared_ptr<DeviceCalls> calls_;
  const Kernels& kernels_;
  Spread spread_;
  double timeout_;
  std::shared_ptr<DeviceWindow> window_;
  std::shared_ptr<DeviceMemory> state_;
  std::shared_ptr<Arena> arena_;
  std::unique_ptr<Pinned> pinned_;
  DeviceLinks links_;
  Consumed* consumed_ = nullptr;
  uint64_t* latches_ = nullptr;  // [kLatchWords], then the words of DeviceLinks::failed
  uint64_t ticket_ = 0;
  uint64_t made_ = 0,
           staged_rows_ = 0;  // calls and staged rows since take_counters(), without replays of graphs
  uint64_t number_ = 0;       // from DeviceCalls::join()
  Captured captured_;

  struct Pool {
    std::mutex mutex;
    std::vector<std::unique_ptr<DevicePlan>> idle;
  };
  std::shared_ptr<Pool> pool_ = std::make_shared<Pool>();
};

}  // namespace moecomm::cuda
