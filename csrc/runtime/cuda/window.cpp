#include "runtime/cuda/window.hpp"

#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>

namespace moecomm::cuda {
namespace {

class MappedWindow : public DeviceWindow {
 public:
  MappedWindow(int device, uint64_t bytes) : device_(device), memory_(DeviceMemory::create(device, bytes)) {
    data_ = memory_->data();
    bytes_ = bytes;
  }
  void connect(int rank, const std::vector<std::string>& cards) override {
    rank_ = rank;
    cards_ = cards;
    mapped_.assign(cards.size(), nullptr);
  }
  char* at(int rank) override {
    if (rank == rank_) return data_;
    if (!mapped_.at(rank)) mapped_[rank] = map(cards_[rank]);
    return mapped_[rank];
  }

 protected:
  virtual char* map(const std::string& card) = 0;
  int device_;
  std::shared_ptr<DeviceMemory> memory_;

 private:
  int rank_ = -1;
  std::vector<std::string> cards_;
  std::vector<char*> mapped_;
};

// Ranks of one process, on one or several GPUs.
class ThreadWindow final : public MappedWindow {
 public:
  using MappedWindow::MappedWindow;
  std::string card() const override {
    const Card c{data_, device_};
    return std::string(reinterpret_cast<const char*>(&c), sizeof(c));
  }

 private:
  struct Card {
    char* data;
    int device;
  };
  char* map(const std::string& card) override {
    Card c;
    if (card.size() != sizeof(c)) throw std::invalid_argument("a peer's card has another size");
    std::memcpy(&c, card.data(), sizeof(c));
    if (c.device != device_) {
      const OnDevice on(device_);
      const cudaError_t e = cudaDeviceEnablePeerAccess(c.device, 0);
      if (e == cudaErrorPeerAccessAlreadyEnabled) cudaGetLastError();   // forget it
      else require(e, "reaching a peer's GPU");
    }
    return c.data;
  }
};

class IpcWindow final : public MappedWindow {
 public:
  using MappedWindow::MappedWindow;
  std::string card() const override { return memory_->export_handle(); }

 private:
  char* map(const std::string& card) override {
    peers_.push_back(DeviceMemory::open(device_, card));
    return peers_.back()->data();
  }
  std::vector<std::shared_ptr<DeviceMemory>> peers_;
};

template <class Window>
class Reach final : public DeviceReach {
 public:
  explicit Reach(int device) : device_(device) {}
  std::shared_ptr<DeviceWindow> window(uint64_t bytes, Peers) override { return std::make_shared<Window>(device_, bytes); }

 private:
  int device_;
};

}  // namespace

bool ipc_works(int device) {
  const auto memory = DeviceMemory::create(device, 4096);
  const OnDevice on(device);
  cudaIpcMemHandle_t handle;
  if (cudaIpcGetMemHandle(&handle, memory->data()) == cudaSuccess) return true;
  cudaGetLastError();   // forget it
  return false;
}

std::shared_ptr<DeviceReach> reach_threads(int device) { return std::make_shared<Reach<ThreadWindow>>(device); }
std::shared_ptr<DeviceReach> reach_processes(int device) { return std::make_shared<Reach<IpcWindow>>(device); }

DeviceBlock::DeviceBlock(std::shared_ptr<DeviceWindow> window, std::shared_ptr<Arena> arena, uint64_t offset, uint64_t bytes)
    : window_(std::move(window)), arena_(std::move(arena)), offset_(offset), bytes_(bytes) {
  arena_->take(offset, bytes);
}
DeviceBlock::~DeviceBlock() {
  if (bytes_) arena_->release(offset_);
}

}  // namespace moecomm::cuda
