// DeviceDomain: a rank's symmetric memory on a GPU, and its verbs as kernels on the caller's stream. The
// counterpart of runtime/cpu/domain.hpp.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/cuda/calls.hpp"
#include "runtime/cuda/window.hpp"
#include "runtime/domain.hpp"

namespace moecomm::cuda {

class DeviceDomain {
 public:
  // The number of warps of the spread must be the number of channels of the shape.
  DeviceDomain(Geometry geometry, DomainShape shape, int device, std::shared_ptr<PeerAccess> peer_access,
               std::shared_ptr<DeviceCalls> calls, Spread spread, double timeout_seconds);

  // Collective: exchange contacts, connect(), then a barrier before the first call.
  std::string contact() const { return window_->contact(); }
  void connect(const std::vector<std::string>& contacts);

  // Enqueued. The source of a write must not change until the stream has reached it.
  Status write(int rank, const std::vector<Rows>& rows, int counter, void* stream);
  Status signal(int rank, int counter, uint64_t add, void* stream);
  // These wait for the stream.
  Status read(int rank, const std::vector<Rows>& rows, void* stream);
  Status wait(int source, int counter, uint64_t at_least, void* stream);
  Status fence(void* stream);
  Status multicast(const std::vector<GroupCall>& calls, Why refused, void* stream);
  Status reduce(const std::vector<GroupCall>& calls, Why refused, void* stream);
  uint64_t counter(int source, int counter) const;

  // For user-defined kernels and roles: docs/write_a_role.md.
  Call begin();
  const DomainView& view() const { return view_; }
  DomainConsumed* consumed() const { return consumed_; }
  Status settled(void* stream, const char* what);  // waits for the stream; returns the kernels' failure

  // Whether the rail is a network, which can only move data in this memory.
  bool from_window_only() const { return network_; }
  const std::shared_ptr<DeviceWindow>& window() const { return window_; }
  uint64_t heap() const { return view_.at.heap.value; }
  Counters take_counters(std::vector<uint64_t>& links);  // waits for the device and resets them

 private:
  Call begin_together();
  Status fault() { return calls_->fault(refusals()); }
  Status one_sided(OneSidedWork work, const std::vector<Rows>& rows, void* stream);
  // By the copy engine, from a rank whose memory is mapped. Waits for the stream.
  Status copy_from(int rank, const std::vector<Segment>& segments, void* stream);
  template <class Args, class Launch>
  Status together(Verb verb, const std::vector<GroupCall>& calls, Why refused, void* stream,
                  int (*start)(const Launch&, void*));
  // Device memory for arguments that do not fit into a launch.
  char* room(uint64_t bytes, void* stream);
  void upload(char* to, const void* from, uint64_t bytes, void* stream);
  FaultRecord* refusals() const { return Offset<FaultRecord>{}.in(pinned_->data()); }

  DomainView view_;
  int device_;
  std::shared_ptr<PeerAccess> peer_access_;
  std::shared_ptr<DeviceCalls> calls_;
  const DomainKernels& kernels_;
  Spread spread_;
  double timeout_;
  std::shared_ptr<DeviceWindow> window_;
  std::shared_ptr<DeviceMemory> state_, room_;
  std::unique_ptr<Pinned> pinned_;
  DeviceLinks links_;
  DomainConsumed* consumed_ = nullptr;
  uint64_t* counts_ = nullptr;  // what DomainConsumed points to
  int32_t* disagreed_ = nullptr;
  uint64_t* latches_ = nullptr;  // [kLatchWords], then the words of DeviceLinks::failed
  void* room_stream_ = nullptr;
  uint64_t made_ = 0;    // calls
  uint64_t number_ = 0;  // of its memory
  bool network_ = false;
  std::vector<bool> mapped_, written_;  // by rank
  struct Copied {
    uint64_t rows = 0, bytes = 0;
  };
  std::vector<Copied> copied_;  // by rank: what the copy engine has read, since take_counters()
};

}  // namespace moecomm::cuda
