// DeviceWindow: a rank's symmetric memory on its GPU (its node window, then its rail region), and where that
// of its peers lies. DeviceReach: how the ranks of a communicator reach each other, by which windows come to
// be.
//
//   threads   ranks of one process: by pointer
//   ipc       processes of one host: CUDA IPC
//   nccl      processes anywhere: NCCL windows, whose rail may be GIN (runtime/cuda/nccl.hpp)
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/cuda/kernels/decode_launch.hpp"
#include "runtime/cuda/kernels/launch.hpp"
#include "runtime/cuda/memory.hpp"
#include "runtime/memory.hpp"

namespace moecomm::cuda {

class DeviceWindow {
 public:
  virtual ~DeviceWindow() = default;
  DeviceWindow(const DeviceWindow&) = delete;
  DeviceWindow& operator=(const DeviceWindow&) = delete;

  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

  // Collective: exchange cards, then connect. Peers are rank by rank as the cards are; `rank` is this one.
  virtual std::string card() const = 0;
  virtual void connect(int rank, const std::vector<std::string>& cards) = 0;
  // After connect(): where a rank's window lies here, null where loads and stores do not reach it.
  virtual char* at(int rank) = 0;
  // What rail kernels find their network by, in device memory; null for kernels that need none.
  virtual const void* network() const { return nullptr; }

  // start() enqueues a kernel that waits for the same one of every other rank. Rank threads of one process
  // share a device's context, where allocations, frees, the loading of a kernel or a full queue of the
  // hardware may wait for whatever runs; so they start together: none before all are ready, and none goes on
  // before all have started. A rank that does not come within `seconds` is left to the kernels, which
  // name it. Nothing of this where a graph is captured.
  Status start_together(void* stream, double seconds, const std::function<void()>& start);
  void tell(int rank, uint64_t offset, FaultWord word,
            void* stream);  // into its memory, where stores reach it; not while a graph is captured
  virtual void leave() {}   // this rank starts nothing here any more: nobody waits for it

 protected:
  DeviceWindow() = default;
  virtual Status meet(double) {
    return {};
  }  // of the hosts of rank threads; a Status where they have been told to give up
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
};

enum class Peers { rail, world };  // whom a window's puts name by index: one rank per node, or every rank

class DeviceReach {
 public:
  virtual ~DeviceReach() = default;
  virtual std::shared_ptr<DeviceWindow> window(uint64_t bytes,
                                               Peers peers = Peers::rail) = 0;  // zero-filled; local
  virtual const Kernels& kernels() const { return loopback_kernels(); }
  virtual const DecodeKernels& decode_kernels() const { return loopback_decode_kernels(); }
  virtual std::string rail() const { return "memory"; }  // what carries rows between nodes
  // Windows that are gone here, by numbers that are equal on all ranks; their memory is kept until release()
  // of those that are gone on every rank, or until this object ends.
  virtual std::vector<int> retired() const { return {}; }
  virtual void release(const std::vector<int>&) {}
  virtual void abort() {
  }  // from any thread: ends waits for peers on the host; no window can be made any more
};

std::shared_ptr<DeviceReach> reach_threads(int device);
std::shared_ptr<DeviceReach> reach_processes(int device);

// Memory to try CUDA IPC with: a GPU's memory may be exported and yet not opened by a process that does not
// see that GPU.
class IpcSample {
 public:
  virtual ~IpcSample() = default;
  virtual std::string handle() const = 0;  // for another process; empty where this GPU exports nothing
  virtual bool opens(const std::string& handle) const = 0;  // another process's
};
std::shared_ptr<IpcSample> ipc_sample(int device);

// As Block, in a window on a GPU. A piece that is released may be taken by the next call at once: its users
// must have been enqueued on the stream of that call, or have finished.
class DeviceBlock {
 public:
  DeviceBlock(std::shared_ptr<DeviceWindow> window, std::shared_ptr<Arena> arena, uint64_t offset,
              uint64_t bytes);
  ~DeviceBlock();
  DeviceBlock(const DeviceBlock&) = delete;
  DeviceBlock& operator=(const DeviceBlock&) = delete;
  char* data() const { return window_->data() + offset_; }
  uint64_t offset() const { return offset_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<DeviceWindow> window_;
  std::shared_ptr<Arena> arena_;
  uint64_t offset_, bytes_;
};

}  // namespace moecomm::cuda
