#include "fabric/ucx.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "fabric/futex.hpp"

namespace moecomm {
namespace {

void require(ucs_status_t s, const char* what) {
  if (s != UCS_OK) throw std::runtime_error(std::string("UCX: ") + what + ": " + ucs_status_string(s));
}

// Requests that UCX could not finish at once are freed when they do.
void free_request(void* request, ucs_status_t, void*) { ucp_request_free(request); }

ucp_request_param_t fire_and_forget() {
  ucp_request_param_t p{};
  p.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK;
  p.cb.send = free_request;
  return p;
}

}  // namespace

void on_endpoint_error(void* arg, ucp_ep_h, int) {
  auto* link = static_cast<UcxContext::Link*>(arg);
  link->context->fail(link->rank);
}

UcxContext::UcxContext(std::mutex& calls, int size) : calls_(calls), links_(size) {
  ucp_config_t* config;
  require(ucp_config_read(nullptr, nullptr, &config), "reading the configuration");
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
  params.name = "moecomm";
  const ucs_status_t s = ucp_init(&params, config, &context_);
  ucp_config_release(config);
  require(s, "initialising");
  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;   // calls of one communicator do not overlap
  require(ucp_worker_create(context_, &worker, &worker_), "creating a worker");
}

UcxContext::~UcxContext() {
  if (server_.joinable()) {
    eventfd_write(stop_, 1);
    server_.join();
  }
  if (stop_ >= 0) close(stop_);
  std::vector<ucs_status_ptr_t> closing;
  for (Link& link : links_) {
    if (!link.endpoint) continue;
    ucp_request_param_t p{};
    p.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    p.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t r = ucp_ep_close_nbx(link.endpoint, &p);
    if (UCS_PTR_IS_PTR(r)) closing.push_back(r);
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  for (ucs_status_ptr_t r : closing) {
    while (ucp_request_check_status(r) == UCS_INPROGRESS && std::chrono::steady_clock::now() < deadline) ucp_worker_progress(worker_);
    ucp_request_free(r);
  }
  if (worker_) ucp_worker_destroy(worker_);
  if (context_) ucp_cleanup(context_);
}

std::string UcxContext::address() const {
  ucp_address_t* address;
  size_t bytes;
  require(ucp_worker_get_address(worker_, &address, &bytes), "reading the worker's address");
  std::string out(reinterpret_cast<const char*>(address), bytes);
  ucp_worker_release_address(worker_, address);
  return out;
}

void UcxContext::connect(int rank, const std::string& address) {
  Link& link = links_[rank];
  if (link.endpoint) return;
  link.context = this;
  link.rank = rank;
  ucp_ep_params_t p{};
  p.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  p.address = reinterpret_cast<const ucp_address_t*>(address.data());
  p.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  p.err_handler.cb = [](void* arg, ucp_ep_h ep, ucs_status_t s) { on_endpoint_error(arg, ep, s); };
  p.err_handler.arg = &link;
  require(ucp_ep_create(worker_, &p, &link.endpoint), "connecting to a peer");
}

void UcxContext::serve() {
  stop_ = eventfd(0, EFD_CLOEXEC);
  server_ = std::thread([this] { serve_loop(); });
}

// Sleeps on the worker's descriptor; while a call runs, the call makes progress itself and this waits.
void UcxContext::serve_loop() noexcept {
  int events = -1;
  if (ucp_worker_get_efd(worker_, &events) != UCS_OK) return;
  for (;;) {
    {
      std::lock_guard lock(calls_);
      do {
        while (ucp_worker_progress(worker_)) {}
      } while (ucp_worker_arm(worker_) == UCS_ERR_BUSY);
    }
    pollfd fds[2] = {{events, POLLIN, 0}, {stop_, POLLIN, 0}};
    poll(fds, 2, -1);
    if (fds[1].revents) return;
  }
}

bool UcxContext::progress() noexcept { return ucp_worker_progress(worker_) != 0; }

void UcxContext::fail(int rank) noexcept {
  int none = -1;
  failed_.compare_exchange_strong(none, rank, std::memory_order_acq_rel);
}

std::string UcxContext::version() { return ucp_get_version_string(); }

UcxRegion::UcxRegion(UcxContext& context, uint64_t bytes, uint64_t counter_bytes) : context_(context), counter_bytes_(counter_bytes) {
  ucp_mem_map_params_t p{};
  p.field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS;
  p.length = bytes;
  p.flags = UCP_MEM_MAP_ALLOCATE;
  require(ucp_mem_map(context.context(), &p, &memory_), "allocating a rail region");
  ucp_mem_attr_t attr{};
  attr.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  require(ucp_mem_query(memory_, &attr), "querying a rail region");
  data_ = attr.address;
  std::memset(data_, 0, bytes);
}

UcxRegion::~UcxRegion() {
  // Requests under way call back into this object: let them end, which for a failed peer is at once.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  while (!flush_poll() && std::chrono::steady_clock::now() < deadline) context_.progress();
  for (Peer& p : peers_)
    if (p.rkey) ucp_rkey_destroy(p.rkey);
  if (UCS_PTR_IS_PTR(flush_)) ucp_request_free(flush_);
  ucp_mem_unmap(context_.context(), memory_);
}

std::string UcxRegion::key() const {
  void* packed;
  size_t bytes;
  require(ucp_rkey_pack(context_.context(), memory_, &packed, &bytes), "packing a key");
  const uint64_t address = reinterpret_cast<uint64_t>(data_);
  std::string out(reinterpret_cast<const char*>(&address), 8);
  out.append(static_cast<const char*>(packed), bytes);
  ucp_rkey_buffer_release(packed);
  return out;
}

void UcxRegion::attach(const std::vector<int>& ranks, const std::vector<std::string>& keys) {
  const char* setting = std::getenv("MOECOMM_UCX_DIRECT");
  const bool direct = !setting || std::strcmp(setting, "0") != 0;
  peers_.resize(keys.size());
  for (size_t n = 0; n < keys.size(); ++n) {
    if (ranks[n] < 0) continue;
    Peer& p = peers_[n];
    p.rank = ranks[n];
    p.region = this;
    p.signalled.assign(counter_bytes_ / 8, 0);
    std::memcpy(&p.address, keys[n].data(), 8);
    require(ucp_ep_rkey_unpack(context_.endpoint(p.rank), keys[n].data() + 8, &p.rkey), "unpacking a rail peer's key");
    void* mapped = nullptr;
    if (direct && ucp_rkey_ptr(p.rkey, p.address, &mapped) == UCS_OK) p.direct = static_cast<char*>(mapped);
  }
}

void UcxRegion::put(int peer, uint64_t offset, const void* src, uint64_t bytes) noexcept {
  const Peer& p = peers_[peer];
  if (p.direct) {
    std::memcpy(p.direct + offset, src, bytes);
    return;
  }
  dirty_ = true;
  const ucp_request_param_t param = fire_and_forget();
  const ucs_status_ptr_t r = ucp_put_nbx(context_.endpoint(p.rank), src, bytes, p.address + offset, p.rkey, &param);
  if (UCS_PTR_IS_ERR(r)) context_.fail(p.rank);
}

// The new value of the counter as a put, once a flush says that all earlier puts to this peer are there. UCX's own fence
// would do where one lane carries everything, but elsewhere it spins until the peer has been scheduled; and UCX's tcp
// transport has no atomics under peer error handling. Signals that come while a flush is under way share the next one.
void UcxRegion::signal(int peer, uint64_t counter, uint64_t add) noexcept {
  Peer& p = peers_[peer];
  if (p.direct) {
    add_and_wake(p.direct, counter, add);
    return;
  }
  const uint64_t value = p.signalled[counter / 8] += add;
  const auto same = std::find_if(p.waiting.begin(), p.waiting.end(), [&](const Signal& s) { return s.counter == counter; });
  if (same != p.waiting.end()) same->value = value;
  else p.waiting.push_back({counter, value});
  flush_peer(p);
}

void UcxRegion::flush_peer(Peer& p) noexcept {
  while (!p.flushing && !p.waiting.empty()) {
    p.covered.swap(p.waiting);
    p.flushing = true;
    ++flushing_;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.user_data = &p;
    param.cb.send = [](void* request, ucs_status_t, void* data) {
      Peer& done = *static_cast<Peer*>(data);
      ucp_request_free(request);
      done.region->send_signals(done);
      done.region->flush_peer(done);
    };
    const ucs_status_ptr_t r = ucp_ep_flush_nbx(context_.endpoint(p.rank), &param);
    if (UCS_PTR_IS_PTR(r)) return;
    if (UCS_PTR_IS_ERR(r)) context_.fail(p.rank);
    send_signals(p);
  }
}

// Each value has a cell of its own: it must stay put until UCX has read it.
void UcxRegion::send_signals(Peer& p) noexcept {
  dirty_ = true;
  for (const Signal& s : p.covered) {
    if (idle_cells_.empty()) {
      cells_.push_back(std::make_unique<SignalCell>(this));
      idle_cells_.push_back(cells_.back().get());
    }
    SignalCell* cell = idle_cells_.back();
    idle_cells_.pop_back();
    cell->value = s.value;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.user_data = cell;
    param.cb.send = [](void* request, ucs_status_t, void* data) {
      auto* done = static_cast<SignalCell*>(data);
      done->region->idle_cells_.push_back(done);
      ucp_request_free(request);
    };
    const ucs_status_ptr_t r = ucp_put_nbx(context_.endpoint(p.rank), &cell->value, 8, p.address + s.counter, p.rkey, &param);
    if (UCS_PTR_IS_PTR(r)) continue;
    idle_cells_.push_back(cell);
    if (UCS_PTR_IS_ERR(r)) context_.fail(p.rank);
  }
  p.covered.clear();
  p.flushing = false;
  --flushing_;
}

bool UcxRegion::flush_poll() noexcept {
  if (flushing_ > 0) return false;   // signals are still to be sent
  if (!flush_) {
    if (!dirty_) return true;
    ucp_request_param_t param{};
    flush_ = ucp_worker_flush_nbx(context_.worker(), &param);
    dirty_ = false;
  }
  if (UCS_PTR_IS_PTR(flush_)) {
    if (ucp_request_check_status(flush_) == UCS_INPROGRESS) return false;
    ucp_request_free(flush_);
  }
  flush_ = nullptr;
  return !dirty_;
}

}  // namespace moecomm
