// DeviceDecode: a rank's decode memory on a GPU, and its four phases as kernels on the caller's stream.
//
// The kernels number the epochs (schedule/decode_slices.hpp). This object numbers its own calls, gives each
// dispatch its number as ticket, and alternates the banks, so that a captured call is correct in every
// replay. A capture must be self-contained: every dispatch before it must have been received, and a handle
// can be used only on one side of its beginning and end.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/cuda/calls.hpp"
#include "runtime/cuda/kernels/decode_launch.hpp"
#include "runtime/cuda/window.hpp"
#include "session/decode_arguments.hpp"
#include "session/turns.hpp"

namespace moecomm::cuda {

using DeviceDecodeDispatch = OnStream<DecodeDispatchCall>;
using DeviceDecodeCombine = OnStream<DecodeCombineCall>;

class DeviceDecode {
 public:
  DeviceDecode(Geometry geometry, Shape shape, bool check, int device,
               std::shared_ptr<PeerAccess> peer_access, std::shared_ptr<DeviceCalls> calls, Spread spread,
               double timeout_seconds);
  static uint64_t bytes(const Geometry& g, const Shape& s);

  // Collective: exchange contacts, connect(), then a barrier before the first call.
  std::string contact() const { return window_->contact(); }
  void connect(const std::vector<std::string>& contacts);

  // All functions enqueue kernels and return. ended() or a later call reports their failures.
  Status dispatch(const DeviceDecodeDispatch& call);      // on success epoch() is that of the new dispatch
  Status dispatch_receive(uint64_t epoch, void* stream);  // no-op if it has been received already
  Status combine(const DeviceDecodeCombine& call);        // the caller has checked that stage() is received
  Status combine_receive(uint64_t epoch, void* stream);
  // Replaces a combine, like DeviceBuffer::refuse_combine. Does nothing if the epoch is not open for a
  // combine.
  Status refuse_combine(uint64_t epoch, Why why, void* stream);
  Status fault();
  Status late_fault();
  Status ended();  // as DeviceBuffer's

  // To continue without dead ranks, like Decode of the cpu world. Captured graphs stay valid and read the
  // mask.
  uint64_t rest();                                     // waits for the device
  uint64_t calls() const { return calls_->number(); }  // the number of the latest one
  void mask(const std::vector<uint8_t>& masked, uint64_t latest, uint64_t calls);

  uint64_t epoch() const { return order_.latest(); }
  DecodeStage stage(uint64_t epoch,
                    void* stream) const;  // by the calls that were made, not by their progress
  bool weighted(uint64_t epoch) const { return turns_[epoch & 1].view.weighted; }

  // The memory of tensors, by bank. Valid as long as this object.
  char* x(int bank) const { return window_->data() + view_.x(bank); }
  char* scales(int bank) const { return window_->data() + view_.scales(bank, 0); }
  char* rows(int bank) const { return window_->data() + view_.rows(bank); }
  char* counts(int bank) const { return window_->data() + view_.counts(bank).value; }
  const DeviceWindow& window() const { return *window_; }
  const DecodeView& view() const { return view_; }
  Counters take_counters();                                     // waits for the device and resets them
  const Counters* counters() const { return links_.counters; }  // in device memory; kernels add to them

 private:
  struct Turn {
    DecodeTurn view;  // without tables; its epoch is this object's count, which is the ticket
    DecodeAnswer answer{};
  };
  Turn& turn(uint64_t epoch) { return turns_[epoch & 1]; }
  Call begin(void* stream, Verb verb, bool begins, bool awaited);
  Status noted(const Status& s);
  Status await_refusal(void* stream);
  Status before_mask(uint64_t epoch) const;
  Status start(void* stream, bool together, const std::function<void()>& launch);
  Status launch(const DecodeDispatchWork& work, void* stream);
  Status launch(const DecodeCombineWork& work, void* stream);
  Status answer(Turn& t, const DeviceDecodeCombine& call);
  int squad(const DecodeTurn& t) const;
  FaultRecord* refusals() const { return Offset<FaultRecord>{}.in(pinned_->data()); }

  DecodeView view_;
  int device_;
  std::shared_ptr<PeerAccess> peer_access_;
  std::shared_ptr<DeviceCalls> calls_;
  const DecodeKernels& kernels_;
  Spread spread_;
  double timeout_;
  std::shared_ptr<DeviceWindow> window_;
  std::shared_ptr<DeviceMemory> state_;
  std::unique_ptr<Pinned> pinned_;
  DeviceLinks links_;
  uint8_t* mask_ = nullptr;      // DecodeView::mask
  int lost_ = -1;                // a masked rank
  uint64_t before_mask_ = 0;     // the latest ticket from before the mask
  uint64_t* barrier_ = nullptr;  // the count of the barrier, then the three words of DeviceLinks::failed
  DecodeMemory memory_{};
  DecodeTurns order_;
  Turn turns_[2];               // by parity
  bool reset_barrier_ = false;  // a call has failed, so the count of the barrier must be reset
  bool broken_ = false;         // by a final failure
  uint64_t number_ = 0;         // from DeviceCalls::join()
};

}  // namespace moecomm::cuda
