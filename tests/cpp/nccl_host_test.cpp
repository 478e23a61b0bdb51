// The use of NCCL by the host code of the cuda world, over an NCCL that records its calls: windows with
// counters are strictly ordered, and objects are destroyed in the order that NCCL requires, without waiting
// for another rank.
#include "fabric/cuda/gin.hpp"  // the emulated NCCL, before anything that includes it

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "check.hpp"

namespace {

// The state of the emulated NCCL, and its recorded calls.
struct State {
  int per_node = 1;
  std::vector<std::unique_ptr<ncclWindow_vidmem>> windows;
  std::set<void*> memory;
  std::vector<std::string> ended;
} state;

}  // namespace

struct ncclComm {
  int ranks, rank;
};

extern "C" {
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id, 7, sizeof(*id));
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId, int rank) {
  *comm = new ncclComm{ranks, rank};
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  state.ended.push_back("abort");
  delete comm;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t) { return "an error"; }
ncclResult_t ncclMemAlloc(void** p, size_t bytes) {
  *p = *state.memory.insert(std::aligned_alloc(4096, bytes)).first;
  return ncclSuccess;
}
ncclResult_t ncclMemFree(void* p) {
  CHECK_EQ(state.memory.erase(p), size_t{1});
  state.ended.push_back("free");
  std::free(p);
  return ncclSuccess;
}
ncclResult_t ncclCommWindowRegister(ncclComm_t, void* p, size_t, ncclWindow_t* window, int flags) {
  state.windows.push_back(
      std::make_unique<ncclWindow_vidmem>(ncclWindow_vidmem{{static_cast<char*>(p)}, flags}));
  *window = state.windows.back().get();
  return ncclSuccess;
}
ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t window) {
  CHECK(state.memory.count(window->base[0]));
  state.ended.push_back("deregister");
  return ncclSuccess;
}
ncclTeam_t ncclTeamLsa(ncclComm_t comm) { return {state.per_node, comm->rank % state.per_node, 1}; }
ncclResult_t ncclGetLsaDevicePointer(ncclWindow_t window, size_t offset, int, void** p) {
  *p = window->base[0] + offset;
  return ncclSuccess;
}
ncclResult_t ncclCommQueryProperties(ncclComm_t, ncclCommProperties* p) {
  *p = {true, NCCL_GIN_TYPE_GDAKI, NCCL_GIN_TYPE_GDAKI, {false, false, true, true}};
  return ncclSuccess;
}
ncclResult_t ncclDevCommCreate(ncclComm_t comm, const ncclDevCommRequirements* wanted, ncclDevComm_t* made) {
  *made = {comm->rank, static_cast<uint32_t>(wanted->ginContextCount), nullptr};
  return ncclSuccess;
}
ncclResult_t ncclDevCommDestroy(ncclComm_t, const ncclDevComm_t*) {
  state.ended.push_back("network");
  return ncclSuccess;
}
}

namespace {

void* symbol(const char* name) {
  static const std::map<std::string, void*> all{
#define SYMBOL(f) {#f, reinterpret_cast<void*>(&f)}
      SYMBOL(ncclGetUniqueId),
      SYMBOL(ncclCommInitRank),
      SYMBOL(ncclCommAbort),
      SYMBOL(ncclGetErrorString),
      SYMBOL(ncclMemAlloc),
      SYMBOL(ncclMemFree),
      SYMBOL(ncclCommWindowRegister),
      SYMBOL(ncclCommWindowDeregister),
      SYMBOL(ncclTeamLsa),
      SYMBOL(ncclGetLsaDevicePointer),
      SYMBOL(ncclCommQueryProperties),
      SYMBOL(ncclDevCommCreate),
      SYMBOL(ncclDevCommDestroy)};
#undef SYMBOL
  return all.at(name);
}

}  // namespace

#define dlopen(path, flags) (&state)
#define dlsym(library, name) symbol(name)
#include "runtime/cuda/memory.cpp"
#include "runtime/cuda/nccl.cpp"
#include "runtime/cuda/window.cpp"

namespace moecomm::cuda {

const Kernels& loopback_kernels() {
  static const Kernels none{};
  return none;
}
const DomainKernels& loopback_domain_kernels() {
  static const DomainKernels none{};
  return none;
}
const DecodeKernels& loopback_decode_kernels() {
  static const DecodeKernels none{};
  return none;
}
const Kernels& gin_kernels() { return loopback_kernels(); }
const DecodeKernels& gin_decode_kernels() { return loopback_decode_kernels(); }
const DomainKernels& gin_domain_kernels() { return loopback_domain_kernels(); }

}  // namespace moecomm::cuda

using namespace moecomm;
namespace device = moecomm::cuda;
using Events = std::vector<std::string>;

namespace {

// Rank 0 of two nodes with two ranks: hosts connected by a network, or one host whose memory NCCL maps.
std::shared_ptr<device::PeerAccess> join(bool network) {
  state = {};
  state.per_node = network ? 2 : 4;
  return device::nccl_peer_access("libnccl", Geometry{0, 4, 2}, 0, device::nccl_unique_id("libnccl"));
}
std::shared_ptr<device::DeviceWindow> connected(device::PeerAccess& peer_access,
                                                device::Peers peers = device::Peers::rail) {
  auto window = peer_access.window(10000, peers);
  window->connect(0, std::vector<std::string>(4, window->contact()));
  return window;
}

}  // namespace

TEST(windows_that_signals_add_to_are_strictly_ordered) {
  const auto peer_access = join(true);
  const auto rail = connected(*peer_access), world = connected(*peer_access, device::Peers::world);
  CHECK_EQ(state.windows.size(), size_t{2});
  for (const auto& w : state.windows) CHECK_EQ(w->flags, NCCL_WIN_COLL_SYMMETRIC | NCCL_WIN_STRICT_ORDERING);
  CHECK_EQ(static_cast<const GinNetwork*>(rail->network())->window, state.windows[0].get());
}

TEST(without_a_network_payload_need_not_be) {
  const auto peer_access = join(false);
  const auto window = connected(*peer_access);
  CHECK_EQ(state.windows[0]->flags, NCCL_WIN_COLL_SYMMETRIC);
  CHECK(window->network() == nullptr);
}

TEST(networks_end_before_windows_and_windows_before_memory) {
  auto peer_access = join(true);
  auto rail = connected(*peer_access), world = connected(*peer_access, device::Peers::world);
  rail.reset();
  CHECK(state.ended.empty());  // closing a buffer is local, but deregistering a window is collective
  peer_access.reset();
  CHECK(state.ended.empty());  // a window is left
  world.reset();
  CHECK((state.ended == Events{"network", "network", "abort", "free", "free"}));
  CHECK(state.memory.empty());
}

TEST(memory_comes_back_when_all_ranks_have_closed_a_window) {
  const auto peer_access = join(true);
  auto a = connected(*peer_access), b = connected(*peer_access), c = connected(*peer_access);
  b.reset();
  a.reset();
  CHECK((peer_access->retired() == std::vector<int>{0, 1}));
  peer_access->release({1});  // another rank still uses the first one
  CHECK((state.ended == Events{"deregister", "free"}));
  CHECK((peer_access->retired() == std::vector<int>{0}));
  bool refused = false;
  try {
    peer_access->release({2});
  } catch (const std::invalid_argument&) { refused = true; }
  CHECK(refused);
}

TEST(a_window_that_was_never_connected_is_freed_at_once) {
  const auto peer_access = join(true);
  peer_access->window(100);
  CHECK((state.ended == Events{"free"}));
}

TEST(what_ends_after_a_failure_is_freed_too) {
  auto peer_access = join(true);
  auto window = connected(*peer_access);
  peer_access->abort();
  window.reset();
  peer_access.reset();
  CHECK((state.ended == Events{"abort", "free"}));
}
