#include "runtime/cuda/nccl.hpp"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>

#include "fabric/cuda/gin.hpp"

namespace moecomm::cuda {
namespace {

constexpr int kContexts = 16;  // requested number of independent streams of a network

// The functions of libnccl that are used, with the types of its headers.
class Library {
 public:
  explicit Library(const std::string& path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays loaded
    if (!handle) throw std::invalid_argument("NCCL: " + std::string(dlerror()));
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
      if (!function)
        throw std::invalid_argument("NCCL: " + path + " has no " + name +
                                    ": it is too old; expected 2.29 or newer");
    };
    find(unique_id, "ncclGetUniqueId");
    find(init, "ncclCommInitRank");
    find(abort, "ncclCommAbort");
    find(error, "ncclGetErrorString");
    find(allocate, "ncclMemAlloc");
    find(free, "ncclMemFree");
    find(enlist, "ncclCommWindowRegister");
    find(delist, "ncclCommWindowDeregister");
    find(lsa, "ncclTeamLsa");
    find(pointer, "ncclGetLsaDevicePointer");
    find(properties, "ncclCommQueryProperties");
    find(create_network, "ncclDevCommCreate");
    find(destroy_network, "ncclDevCommDestroy");
  }
  void require(ncclResult_t result, const char* what) const {
    if (result != ncclSuccess) throw std::runtime_error(std::string("NCCL: ") + what + ": " + error(result));
  }

  decltype(&ncclGetUniqueId) unique_id;
  decltype(&ncclCommInitRank) init;
  decltype(&ncclCommAbort) abort;
  decltype(&ncclGetErrorString) error;
  decltype(&ncclMemAlloc) allocate;
  decltype(&ncclMemFree) free;
  decltype(&ncclCommWindowRegister) enlist;
  decltype(&ncclCommWindowDeregister) delist;
  decltype(&ncclTeamLsa) lsa;
  decltype(&ncclGetLsaDevicePointer) pointer;
  decltype(&ncclCommQueryProperties) properties;
  decltype(&ncclDevCommCreate) create_network;
  decltype(&ncclDevCommDestroy) destroy_network;
};

// An NCCL communicator. Its LSA team is the consecutive ranks that access each other's windows by loads and
// stores.
class NcclPeerAccess final : public PeerAccess, public std::enable_shared_from_this<NcclPeerAccess> {
 public:
  NcclPeerAccess(const std::string& library, const Geometry& geometry, int device,
                 const std::string& unique_id)
      : library(library), geometry(geometry), device(device) {
    ncclUniqueId id;
    if (unique_id.size() != sizeof(id)) throw std::invalid_argument("NCCL: a unique id has another size");
    std::memcpy(&id, unique_id.data(), sizeof(id));
    const OnDevice on(device);
    this->library.require(this->library.init(&comm_, geometry.size, id, geometry.rank), "joining the world");
    lsa_ = this->library.lsa(comm_);
    for (int d = 0; d < geometry.ranks_per_node; ++d)
      if (lsa_index(geometry.rank_at(geometry.node(), d)) < 0)
        throw std::invalid_argument("NCCL: ranks of a node do not reach each other's memory (teams of " +
                                    std::to_string(lsa_.nRanks) +
                                    " ranks); expected ranks_per_node to divide that");
    for (int n = 0; n < geometry.nodes(); ++n) by_memory_ &= lsa_index(geometry.rail_rank(n)) >= 0;
    if (!by_memory_) choose_network();
  }
  // NCCL requires this order: networks, then the windows that they use, then memory. None of it waits for
  // another rank: abort() is local, unlike a regular destruction, and also ends the remaining windows.
  ~NcclPeerAccess() override {
    for (auto& network : networks_)
      if (network && comm_) library.destroy_network(comm_, &*network);
    abort();
    for (const auto& [number, gone] : retired_) library.free(gone.data);
  }

  std::shared_ptr<DeviceWindow> window(uint64_t bytes, Peers peers) override;
  const Kernels& kernels() const override { return by_memory_ ? loopback_kernels() : gin_kernels(); }
  const DecodeKernels& decode_kernels() const override {
    return by_memory_ ? loopback_decode_kernels() : gin_decode_kernels();
  }
  const DomainKernels& domain_kernels() const override {
    return by_memory_ ? loopback_domain_kernels() : gin_domain_kernels();
  }
  std::string rail() const override {
    return by_memory_ ? "memory" : type_ == NCCL_GIN_TYPE_GDAKI ? "NCCL GIN (IBGDA)" : "NCCL GIN (proxy)";
  }
  void abort() override {
    std::lock_guard lock(mutex_);
    if (comm_) library.abort(comm_);
    comm_ = nullptr;
  }

  std::vector<int> retired() const override {
    std::lock_guard lock(mutex_);
    std::vector<int> numbers;
    for (const auto& [number, gone] : retired_) numbers.push_back(number);
    return numbers;
  }
  void release(const std::vector<int>& numbers) override {
    std::lock_guard lock(mutex_);
    for (int number : numbers) {
      const auto found = retired_.find(number);
      if (found == retired_.end())
        throw std::invalid_argument("NCCL: window " + std::to_string(number) + " is in use, or gone");
      if (comm_) library.delist(comm_, found->second.window);
      library.free(found->second.data);
      retired_.erase(found);
    }
  }
  int number_window() { return windows_++; }
  // Retires a window. NCCL places windows at the same offset on all ranks only if all ranks register and
  // deregister the same windows in the same order, but ranks may close their buffers in any order.
  void retire(int number, ncclWindow_t window, char* data) {
    std::lock_guard lock(mutex_);
    retired_[number] = {window, data};
  }

  ncclComm_t comm() const { return comm_; }
  bool by_memory() const { return by_memory_; }
  // A rank's index in the LSA team; -1: not in it.
  int lsa_index(int rank) const {
    const int away = rank - geometry.rank, index = lsa_.rank + away / lsa_.stride;
    return away % lsa_.stride == 0 && index >= 0 && index < lsa_.nRanks ? index : -1;
  }
  // Collective on first use.
  const ncclDevComm& network(Peers peers) {
    auto& network = networks_[static_cast<int>(peers)];
    if (network) return *network;
    ncclDevCommRequirements wanted = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
    wanted.ginContextCount = kContexts;
    wanted.ginType = type_;
    // NCCL's rails connect ranks with the same index in their LSA teams. They are moecomm's rails if a node
    // is a team.
    wanted.ginConnectionType = peers == Peers::rail && lsa_.nRanks == geometry.ranks_per_node
                                   ? NCCL_GIN_CONNECTION_RAIL
                                   : NCCL_GIN_CONNECTION_FULL;
    ncclDevComm made;
    library.require(library.create_network(comm_, &wanted, &made), "creating the network");
    network = made;
    return *network;
  }

  const Library library;
  const Geometry geometry;
  const int device;

 private:
  void choose_network() {
    ncclCommProperties p = NCCL_COMM_PROPERTIES_INITIALIZER;
    library.require(library.properties(comm_, &p), "querying the communicator's properties");
    const bool any =
        p.deviceApiSupport && (p.ginType != NCCL_GIN_TYPE_NONE || p.railedGinType != NCCL_GIN_TYPE_NONE);
    if (any && p.ginSupport[NCCL_GIN_TYPE_GDAKI])
      type_ = NCCL_GIN_TYPE_GDAKI;
    else if (any && p.ginSupport[NCCL_GIN_TYPE_PROXY])
      type_ = NCCL_GIN_TYPE_PROXY;
    else
      throw std::invalid_argument(
          "NCCL: nodes do not reach each other's memory, and NCCL offers no network to kernels here (GIN "
          "type " +
          std::to_string(p.ginType) +
          "); expected IBGDA or its proxy, which need an InfiniBand or RoCE device");
  }

  ncclComm_t comm_ = nullptr;
  ncclTeam_t lsa_{};
  bool by_memory_ = true;
  ncclGinType_t type_ = NCCL_GIN_TYPE_NONE;
  std::optional<ncclDevComm> networks_[2];  // by Peers
  struct Retired {
    ncclWindow_t window;
    char* data;
  };
  std::map<int, Retired> retired_;
  int windows_ = 0;  // number of windows registered so far
  mutable std::mutex mutex_;
};

class NcclWindow final : public DeviceWindow {
 public:
  NcclWindow(std::shared_ptr<NcclPeerAccess> peer_access, uint64_t bytes, Peers peers)
      : peer_access_(std::move(peer_access)), peers_(peers) {
    const OnDevice on(peer_access_->device);
    void* p = nullptr;
    bytes_ = align_up(bytes, NCCL_WIN_REQUIRED_ALIGNMENT);
    peer_access_->library.require(peer_access_->library.allocate(&p, bytes_),
                                  ("allocating " + std::to_string(bytes_) + " bytes").c_str());
    data_ = static_cast<char*>(p);
    require(cudaMemset(data_, 0, bytes_), "clearing memory");
    require(cudaDeviceSynchronize(), "clearing memory");
  }
  ~NcclWindow() override {
    if (window_)
      peer_access_->retire(number_, window_, data_);
    else
      peer_access_->library.free(data_);
  }

  std::string contact() const override { return std::to_string(bytes_); }
  void connect(int, const std::vector<std::string>& contacts) override {
    for (const std::string& c : contacts)
      if (c != contact())
        throw std::invalid_argument("NCCL: windows of " + c + " and " + contact() +
                                    " bytes; expected one size");
    const OnDevice on(peer_access_->device);
    peer_access_->library.require(
        peer_access_->library.enlist(peer_access_->comm(), data_, bytes_, &window_,
                                     peer_access_->by_memory() ? NCCL_WIN_COLL_SYMMETRIC : kGinWindowFlags),
        "registering a window");
    number_ = peer_access_->number_window();
    if (peer_access_->by_memory()) return;
    const Geometry& g = peer_access_->geometry;
    const ncclTeam team =
        peers_ == Peers::rail ? ncclTeam{g.nodes(), g.node(), g.ranks_per_node} : ncclTeam{g.size, g.rank, 1};
    const GinNetwork network{peer_access_->network(peers_), window_, team};
    network_ = DeviceMemory::create(peer_access_->device, sizeof(network));
    require(cudaMemcpy(network_->data(), &network, sizeof(network), cudaMemcpyHostToDevice),
            "writing the network");
  }
  char* at(int rank) override {
    const int index = peer_access_->lsa_index(rank);
    if (rank == peer_access_->geometry.rank) return data_;
    if (index < 0) return nullptr;
    void* p = nullptr;
    peer_access_->library.require(peer_access_->library.pointer(window_, 0, index, &p),
                                  "reaching a peer's window");
    return static_cast<char*>(p);
  }
  const void* network() const override { return network_ ? network_->data() : nullptr; }

 private:
  std::shared_ptr<NcclPeerAccess> peer_access_;
  Peers peers_;
  ncclWindow_t window_ = nullptr;
  int number_ = -1;  // its number among the registered windows
  std::shared_ptr<DeviceMemory> network_;
};

std::shared_ptr<DeviceWindow> NcclPeerAccess::window(uint64_t bytes, Peers peers) {
  return std::make_shared<NcclWindow>(shared_from_this(), bytes, peers);
}

}  // namespace

int nccl_headers() { return NCCL_VERSION_CODE; }

std::string nccl_unique_id(const std::string& library) {
  const Library nccl(library);
  ncclUniqueId id;
  nccl.require(nccl.unique_id(&id), "making a unique id");
  return std::string(id.internal, sizeof(id.internal));
}

std::shared_ptr<PeerAccess> nccl_peer_access(const std::string& library, const Geometry& geometry, int device,
                                             const std::string& unique_id) {
  return std::make_shared<NcclPeerAccess>(library, geometry, device, unique_id);
}

}  // namespace moecomm::cuda
