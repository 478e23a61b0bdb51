// DeviceCalls: the calls of a rank on its communicator, for all buffers. It has the record of the final
// failure, and the board: a small window in which every rank reports its final failure and the call that it
// waits in. Ranks that wait for each other in different calls, or on different buffers, read different
// windows, but all read the board.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/cuda/window.hpp"

namespace moecomm::cuda {

class DeviceCalls {
 public:
  // There is no board before connect(); failures of one buffer are then not reported to others.
  explicit DeviceCalls(int device);

  // Collective, before the first buffer is made: make_board(), exchange contacts, connect().
  void make_board(const Geometry& geometry, PeerAccess& peer_access);
  std::string contact() const { return board_->contact(); }
  void connect(const std::vector<std::string>& contacts);

  // Returns the number of a buffer's memory, which identifies it in call words. All ranks call it in the same
  // order.
  uint64_t join() { return ++memories_; }
  // Sets the fields of `links` that kernels need. refusals: the buffer's own record.
  void introduce(DeviceLinks& links, FaultRecord* refusals) const;

  // The failure that kernels have reported so far. A final failure of any buffer stays. A failure of a call
  // on the buffer with these `refusals` (may be null) is cleared when it is returned. If this rank's picks
  // were invalid in a call that no host waited for, that is returned first, once and unchanged. It is final
  // from then on, because the ranks are out of step.
  Status fault(FaultRecord* refusals = nullptr);
  // The same, for calls that no host waited for. ended: return only final failures; the next call, which
  // every rank makes, returns the others.
  Status late_fault(FaultRecord* refusals, bool ended);
  Status break_with(const Status& s);  // the first counts

  // To continue without dead ranks, while no kernel of this rank runs; see DeviceDecode::mask().
  uint64_t number();  // of the latest call
  void continue_without(const std::vector<uint8_t>& masked, uint64_t number);

  // Like DeviceWindow::start_together(), but for all calls of the communicator.
  Status start_together(DeviceWindow& own, void* stream, double seconds, const std::function<void()>& start);

 private:
  void end(const Status& s);
  Status taken(FaultRecord* refusals);
  FaultRecord* record() const { return Offset<FaultRecord>{}.in(pinned_->data()); }
  FaultRecord* own() const { return record() + 1; }

  int device_;
  Geometry geometry_;
  std::unique_ptr<Pinned> pinned_;
  std::shared_ptr<DeviceWindow> board_;
  std::shared_ptr<DeviceMemory> state_;
  DeviceLinks* links_ = nullptr;  // of the board, in device memory
  CallClock* clock_ = nullptr;
  std::atomic<uint64_t> memories_{0};
  uint64_t masks_ = 0;  // how often ranks were masked
  std::mutex mutex_;
  Status broken_;
};

}  // namespace moecomm::cuda
