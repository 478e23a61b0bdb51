#include "runtime/cuda/window.hpp"

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace moecomm::cuda {

Status DeviceWindow::start_together(void* stream, double seconds, const std::function<void()>& start) {
  const bool runs = capture_of(stream) == 0;
  if (runs) MOE_TRY(meet(seconds));
  start();
  return runs ? meet(seconds) : Status{};
}

namespace {

class MappedWindow : public DeviceWindow {
 public:
  MappedWindow(int device, uint64_t bytes) : device_(device), memory_(DeviceMemory::create(device, bytes)) {
    data_ = memory_->data();
    bytes_ = bytes;
  }
  void connect(int rank, const std::vector<std::string>& contacts) override {
    rank_ = rank;
    contacts_ = contacts;
    mapped_.assign(contacts.size(), nullptr);
  }
  char* at(int rank) override {
    if (rank == rank_) return data_;
    if (!mapped_.at(rank)) mapped_[rank] = map(contacts_[rank]);
    return mapped_[rank];
  }

 protected:
  virtual char* map(const std::string& contact) = 0;
  int device_;
  std::shared_ptr<DeviceMemory> memory_;

 private:
  int rank_ = -1;
  std::vector<std::string> contacts_;
  std::vector<char*> mapped_;
};

// Ranks of one process, on one or several GPUs.
class ThreadWindow final : public MappedWindow {
 public:
  using Counter = std::atomic<uint64_t>;
  ThreadWindow(int device, uint64_t bytes, std::shared_ptr<std::atomic<bool>> abandoned)
      : MappedWindow(device, bytes), abandoned_(std::move(abandoned)) {}
  std::string contact() const override {
    const Contact c{data_, device_, &meetings_};
    return std::string(bytes_of(&c), sizeof(c));
  }
  void connect(int rank,
               const std::vector<std::string>& contacts) override {  // peers live until all have connected
    MappedWindow::connect(rank, contacts);
    all_.clear();
    for (const std::string& contact : contacts) all_.push_back(*read(contact).meetings);
  }

  void continue_without(const std::vector<uint8_t>& masked, uint64_t time) override {
    masked_ = masked;
    late_ = false;
    *meetings_ = (uint64_t{1} << 63) + (time << 40);  // equal on all remaining ranks, and higher than before
  }
  void leave() override { *meetings_ = uint64_t{1} << 63; }  // as if it had come to all future barriers

 private:
  struct Contact {
    char* data;
    int device;
    const std::shared_ptr<Counter>* meetings;
  };
  static Contact read(const std::string& contact) {
    Contact c;
    if (contact.size() != sizeof(c)) throw std::invalid_argument("a peer's contact has the wrong size");
    std::memcpy(&c, contact.data(), sizeof(c));
    return c;
  }
  Status meet(double seconds) override {
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now(), deadline = begin + std::chrono::duration_cast<Clock::duration>(
                                                            std::chrono::duration<double>(seconds));
    const uint64_t round = meetings_->fetch_add(1) + 1;
    for (size_t rank = 0; rank < all_.size() && !late_; ++rank)
      while (!(rank < masked_.size() && masked_[rank]) && all_[rank]->load() < round && !late_) {
        if (abandoned_->load())
          return {Code::lost, Phase::none, static_cast<int32_t>(rank), 0, round, all_[rank]->load()};
        const auto now = Clock::now();
        late_ = now >= deadline;
        if (now - begin < std::chrono::milliseconds(1))
          std::this_thread::yield();
        else
          std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    return {};
  }

  std::shared_ptr<Counter> meetings_ = std::make_shared<Counter>(0);  // barriers that this rank has come to
  std::vector<std::shared_ptr<Counter>> all_;                         // the counters of all ranks
  std::vector<uint8_t> masked_;  // by rank, not 0: masked, and not waited for
  std::shared_ptr<std::atomic<bool>> abandoned_;
  bool late_ = false;  // a rank did not come in time: do not wait again
  char* map(const std::string& contact) override {
    const Contact c = read(contact);
    if (c.device != device_) {
      const OnDevice on(device_);
      const cudaError_t e = cudaDeviceEnablePeerAccess(c.device, 0);
      if (e == cudaErrorPeerAccessAlreadyEnabled)
        cudaGetLastError();  // clears it
      else
        require(e, "enabling access to a peer's GPU");
    }
    return c.data;
  }
};

class IpcWindow final : public MappedWindow {
 public:
  // A multiple of 2 MiB: the driver shares memory in such units, together with other data in them.
  IpcWindow(int device, uint64_t bytes) : MappedWindow(device, align_up(bytes, uint64_t{2} << 20)) {}
  std::string contact() const override { return memory_->export_handle(); }

 private:
  char* map(const std::string& contact) override {
    peers_.push_back(DeviceMemory::open(device_, contact));
    return peers_.back()->data();
  }
  std::vector<std::shared_ptr<DeviceMemory>> peers_;
};

class ThreadPeerAccess final : public PeerAccess {
 public:
  explicit ThreadPeerAccess(int device) : device_(device) {}
  std::shared_ptr<DeviceWindow> window(uint64_t bytes, Peers) override {
    return std::make_shared<ThreadWindow>(device_, bytes, abandoned_);
  }
  void abort() override { *abandoned_ = true; }

 private:
  int device_;
  std::shared_ptr<std::atomic<bool>> abandoned_ = std::make_shared<std::atomic<bool>>(false);
};

class IpcPeerAccess final : public PeerAccess {
 public:
  explicit IpcPeerAccess(int device) : device_(device) {}
  std::shared_ptr<DeviceWindow> window(uint64_t bytes, Peers) override {
    return std::make_shared<IpcWindow>(device_, bytes);
  }

 private:
  int device_;
};

}  // namespace

namespace {

// 2 MiB, because windows are multiples of it.
class Sample final : public IpcSample {
 public:
  explicit Sample(int device) : device_(device), memory_(DeviceMemory::create(device, uint64_t{2} << 20)) {
    const OnDevice on(device);
    cudaIpcMemHandle_t h;
    if (cudaIpcGetMemHandle(&h, memory_->data()) == cudaSuccess)
      handle_.assign(bytes_of(&h), sizeof(h));
    else
      cudaGetLastError();  // forget it
  }
  std::string handle() const override { return handle_; }
  bool opens(const std::string& peer) const override {
    const OnDevice on(device_);
    cudaIpcMemHandle_t h;
    if (peer.size() != sizeof(h)) return false;
    std::memcpy(&h, peer.data(), sizeof(h));
    void* p = nullptr;
    if (cudaIpcOpenMemHandle(&p, h, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    cudaIpcCloseMemHandle(p);
    return true;
  }

 private:
  int device_;
  std::shared_ptr<DeviceMemory> memory_;
  std::string handle_;
};

}  // namespace

std::shared_ptr<IpcSample> ipc_sample(int device) { return std::make_shared<Sample>(device); }

std::shared_ptr<PeerAccess> thread_peer_access(int device) {
  return std::make_shared<ThreadPeerAccess>(device);
}
std::shared_ptr<PeerAccess> process_peer_access(int device) {
  return std::make_shared<IpcPeerAccess>(device);
}

}  // namespace moecomm::cuda
