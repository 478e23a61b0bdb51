// DeviceDecode: a rank's decode memory on a GPU, and its four phases as kernels on the caller's stream.
//
// The kernels number the epochs (schedule/decode_slices.hpp); this object numbers its own calls, gives each
// dispatch its number as ticket and alternates the banks, so that what is captured into a graph stays right
// in every replay. A capture must be whole: nothing that was sent before it may still be unreceived, and
// handles do not cross its ends.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/calls.hpp"
#include "runtime/cuda/kernels/decode_launch.hpp"
#include "runtime/cuda/window.hpp"

namespace moecomm::cuda {

using DeviceDecodeDispatch = OnStream<DecodeDispatchCall>;
using DeviceDecodeCombine = OnStream<DecodeCombineCall>;

class DeviceDecode {
 public:
  DeviceDecode(Geometry geometry, Shape shape, bool check, int device, std::shared_ptr<DeviceReach> reach,
               Spread spread, double timeout_seconds);
  static uint64_t bytes(const Geometry& g, const Shape& s);

  // Collective: exchange cards, connect, meet in a barrier before the first call.
  std::string card() const { return window_->card(); }
  void connect(const std::vector<std::string>& cards);

  // All enqueue and return; what kernels report is found by a later call or by fault().
  Status dispatch(const DeviceDecodeDispatch& call);      // on ok, epoch() is the new dispatch
  Status dispatch_receive(uint64_t epoch, void* stream);  // nothing where it is received already
  Status combine(const DeviceDecodeCombine& call);        // the caller has looked at stage(): received
  Status combine_receive(uint64_t epoch, void* stream);
  // In the place of a combine, as DeviceBuffer::refuse_combine; nothing where the epoch is not open for one.
  Status refuse_combine(uint64_t epoch, Why why, void* stream);
  Status fault();  // a final failure stays; others are forgotten once told

  uint64_t epoch() const { return epoch_; }
  DecodeStage stage(uint64_t epoch, void* stream) const;  // as the calls were made
  bool weighted(uint64_t epoch) const { return turns_[epoch & 1].view.weighted; }

  // Memory of a bank, for tensors: as long as this object lives.
  char* x(int bank) const { return window_->data() + view_.x(bank); }
  char* scales(int bank) const { return window_->data() + view_.scales(bank, 0); }
  char* rows(int bank) const { return window_->data() + view_.rows(bank); }
  char* counts(int bank) const { return window_->data() + view_.counts(bank).value; }
  const DeviceWindow& window() const { return *window_; }
  const DecodeView& view() const { return view_; }
  Counters take_counters();                                     // waits for the device; and resets
  const Counters* counters() const { return links_.counters; }  // in device memory; kernels add to them

 private:
  struct Turn {
    DecodeTurn view;     // what the host knows: not the epoch of the kernels, nor tables
    uint64_t epoch = 0;  // of this object, and the ticket
    DecodeStage stage = DecodeStage::idle;
    uint64_t capture = 0;  // of the stream when it was dispatched; 0: none
    int32_t combine_mode = 0;
    Wire wire = Wire::plain;
    char* y = nullptr;
  };
  Turn& turn(uint64_t epoch) { return turns_[epoch & 1]; }
  Call begin(void* stream);
  Status late_fault(void* stream);
  Status settled(void* stream);
  Status launch(Turn& t, DecodeDispatchWork work, void* stream);
  Status launch(Turn& t, DecodeCombineWork work, void* stream);
  int squad(const Turn& t) const;
  FaultRecord* records() const { return Offset<FaultRecord>{}.in(pinned_->data()); }

  DecodeView view_;
  int device_;
  std::shared_ptr<DeviceReach> reach_;
  const DecodeKernels& kernels_;
  Spread spread_;
  double timeout_;
  std::shared_ptr<DeviceWindow> window_;
  std::shared_ptr<DeviceMemory> state_;
  std::unique_ptr<Pinned> pinned_;
  DeviceLinks links_;
  DecodeClock* clock_ = nullptr;
  uint64_t* met_ = nullptr;  // the count of the meetings, then the three words that DeviceLinks::failed names
  char* tables_ = nullptr;
  uint64_t table_bytes_ = 0;
  int32_t* apart_ = nullptr;
  Turn turns_[2];
  uint64_t epoch_ = 0;
  bool unclean_ = false;  // a call has failed: meetings are out of step
  Status broken_;
};

}  // namespace moecomm::cuda
