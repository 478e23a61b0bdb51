// DeviceWindow: a rank's symmetric memory on its GPU (its node window, then its rail region), and the
// addresses of its peers' windows. PeerAccess: how the ranks of a communicator access each other's memory.
// It makes the windows.
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
#include "runtime/cuda/kernels/domain_launch.hpp"
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

  // Collective: exchange contacts, then connect(). The contacts are those of all peers in order; `rank` is
  // this rank's index among them.
  virtual std::string contact() const = 0;
  virtual void connect(int rank, const std::vector<std::string>& contacts) = 0;
  // After connect(): the local address of a rank's window; null if loads and stores cannot reach it.
  virtual char* at(int rank) = 0;
  // The network for rail kernels, in device memory; null if they need none.
  virtual const void* network() const { return nullptr; }

  // start() enqueues a kernel that waits for the same kernel of every other rank. Rank threads of one process
  // share a device context, in which an allocation, a free, the loading of a kernel or a full hardware queue
  // may wait for a running kernel. So they start together: none before all are ready, and none continues
  // before all have started. If a rank does not come within `seconds`, the kernels start anyway and report
  // it. During a capture the ranks do not wait for each other.
  Status start_together(void* stream, double seconds, const std::function<void()>& start);
  virtual void leave() {}  // this rank starts no further kernel, so no rank waits for it
  // Continues without masked ranks (by rank, not 0: masked). time: how often this has been called.
  virtual void continue_without(const std::vector<uint8_t>&, uint64_t) {}

 protected:
  DeviceWindow() = default;
  // A barrier of rank threads on the host. Returns a failure after abort().
  virtual Status meet(double) { return {}; }
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
};

enum class Peers { rail, world };  // the peers of put() by index: the ranks of the rail, or all ranks

class PeerAccess {
 public:
  virtual ~PeerAccess() = default;
  virtual std::shared_ptr<DeviceWindow> window(uint64_t bytes,
                                               Peers peers = Peers::rail) = 0;  // zero-filled; local
  virtual const Kernels& kernels() const { return loopback_kernels(); }
  virtual const DecodeKernels& decode_kernels() const { return loopback_decode_kernels(); }
  virtual const DomainKernels& domain_kernels() const { return loopback_domain_kernels(); }
  virtual std::string rail() const { return "memory"; }  // how rows cross nodes, for users
  // Windows that this rank has closed, by numbers that are equal on all ranks. Their memory is kept until
  // release(), which is called with those that all ranks have closed, or until this object is destroyed.
  virtual std::vector<int> retired() const { return {}; }
  virtual void release(const std::vector<int>&) {}
  // May be called on any thread: ends waits for peers on the host. No window can be made afterwards.
  virtual void abort() {}
};

std::shared_ptr<PeerAccess> thread_peer_access(int device);
std::shared_ptr<PeerAccess> process_peer_access(int device);

// A sample of memory to test CUDA IPC: memory that a GPU can export may still not open in a process that
// cannot see that GPU.
class IpcSample {
 public:
  virtual ~IpcSample() = default;
  virtual std::string handle() const = 0;  // for another process; empty if this GPU cannot export memory
  virtual bool opens(
      const std::string& handle) const = 0;  // whether the handle of another process opens here
};
std::shared_ptr<IpcSample> ipc_sample(int device);

// A released block may be reused by the next call at once. So its users must have been enqueued on the stream
// of that call, or must have finished.
using DeviceBlock = HeldPart<DeviceWindow>;

}  // namespace moecomm::cuda
