#include "fabric/cpu/ucx.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "fabric/cpu/futex.hpp"
#include "fabric/cpu/ucx_library.hpp"
#include "fabric/cpu/ucx_line.hpp"
#include "fabric/cpu/ucx_rescue.hpp"

namespace moecomm {
namespace {

void require(ucs_status_t s, const char* what) {
  if (s != UCS_OK) throw std::runtime_error(std::string("UCX: ") + what + ": " + ucs_status_string(s));
}

}  // namespace

void on_endpoint_error(void* arg, ucp_ep_h, int) {
  auto* link = static_cast<UcxContext::Link*>(arg);
  link->context->fail(link->rank);
}

UcxContext::UcxContext() {
  require_ucx();
  ucp_config_t* config;
  require(ucp_config_read(nullptr, nullptr, &config), "reading the configuration");
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
  params.name = "moecomm";
  const ucs_status_t s = ucp_init(&params, config, &context_);
  ucp_config_release(config);
  require(s, "initializing");
  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;  // calls of one communicator do not overlap
  require(ucp_worker_create(context_, &worker, &worker_), "creating a worker");
}

void UcxContext::enter(std::timed_mutex& calls, int size) {
  calls_ = &calls;
  links_ = std::vector<Link>(size);
}

UcxContext::~UcxContext() {
  if (!process_.is_here()) {  // a forked child: the thread does not exist here, and the parent has the
                              // connections
    new std::thread(std::move(server_));
    return;
  }
  if (server_.joinable()) {
    eventfd_write(stop_, 1);
    server_.join();
  }
  if (stop_ >= 0) close(stop_);
  abandon();
  if (dead_) {  // UCX cannot be shut down, and peers may still write: the memory is kept until the process
                // ends
    new auto(std::move(retired_));
    return;
  }
  if (worker_) ucp_worker_destroy(worker_);
  for (auto& [memory, rest] : retired_) ucp_mem_unmap(context_, memory);
  if (context_) ucp_cleanup(context_);
}

void UcxContext::abandon() noexcept {
  abandoned_ = true;
  if (dead_) return;
  std::vector<ucs_status_ptr_t> closing;
  for (Link& link : links_) {
    if (!link.endpoint) continue;
    ucp_request_param_t p{};
    p.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    p.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t r = ucp_ep_close_nbx(link.endpoint, &p);
    link.endpoint = nullptr;
    if (UCS_PTR_IS_PTR(r)) closing.push_back(r);
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  for (ucs_status_ptr_t r : closing) {
    while (!dead_ && ucp_request_check_status(r) == UCS_INPROGRESS &&
           std::chrono::steady_clock::now() < deadline)
      progress();
    if (!dead_) ucp_request_free(r);
  }
}

void UcxContext::retire(ucp_mem_h memory, std::shared_ptr<void> rest) {
  retired_.emplace_back(memory, std::move(rest));
}

std::string UcxContext::address() const {
  ucp_address_t* address;
  size_t bytes;
  require(ucp_worker_get_address(worker_, &address, &bytes), "reading the worker's address");
  std::string out(bytes_of(address), bytes);
  ucp_worker_release_address(worker_, address);
  return out;
}

void UcxContext::connect(int rank, const std::string& address) {
  Link& link = links_[rank];
  if (link.endpoint) return;
  link.context = this;
  link.rank = rank;
  ucp_ep_params_t p{};
  p.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                 UCP_EP_PARAM_FIELD_ERR_HANDLER;
  p.address = as<ucp_address_t>(address.data());
  p.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  p.err_handler.cb = [](void* arg, ucp_ep_h ep, ucs_status_t s) { on_endpoint_error(arg, ep, s); };
  p.err_handler.arg = &link;
  const ucs_status_t s = ucp_ep_create(worker_, &p, &link.endpoint);
  if (s == UCS_OK) return;
  const char* tls = std::getenv("UCX_TLS");
  throw std::runtime_error(
      "UCX cannot connect to rank " + std::to_string(rank) + " on another node: " + ucs_status_string(s) +
      "; UCX_TLS is " + (tls ? tls : "not set") +
      "; expected a list with a network transport (tcp, rc, dc), even for nodes on one host");
}

void UcxContext::serve() {
  stop_ = eventfd(0, EFD_CLOEXEC);
  server_ = std::thread([this] { serve_loop(); });
}

// Sleeps on the worker's descriptor. While a call runs, the call makes progress, and this thread waits for
// the lock.
void UcxContext::serve_loop() noexcept {
  int events = -1;
  if (ucp_worker_get_efd(worker_, &events) != UCS_OK) return;
  for (;;) {
    {
      std::lock_guard lock(*calls_);
      do {
        while (progress()) {}
        if (dead_) return;
      } while (ucp_worker_arm(worker_) == UCS_ERR_BUSY);
    }
    pollfd fds[2] = {{events, POLLIN, 0}, {stop_, POLLIN, 0}};
    poll(fds, 2, -1);
    if (fds[1].revents) return;
  }
}

bool UcxContext::progress() noexcept {
  if (dead_) return false;
  unsigned moved = 0;
  if (survives_abort([this, &moved] { moved = ucp_worker_progress(worker_); })) return moved != 0;
  if (std::none_of(links_.begin(), links_.end(),
                   [](const Link& l) { return l.failed.load(std::memory_order_acquire); }))
    std::abort();  // another error
  dead_ = abandoned_ = true;
  for (Link& link : links_) link.endpoint = nullptr;
  return false;
}

int UcxContext::lost(int rank) const noexcept {
  if (rank < 0 || links_[rank].failed.load(std::memory_order_acquire) || !dead_)
    return failed(rank) ? rank : -1;
  // The connection that failed before caused the abort, even if this rank waits for another rank.
  for (const Link& link : links_)
    if (link.failed.load(std::memory_order_acquire)) return link.rank;
  return rank;
}

std::string UcxContext::version() { return ucp_get_version_string(); }

UcxRegion::UcxRegion(UcxContext& context, uint64_t bytes, uint64_t counter_bytes)
    : context_(context), counter_bytes_(counter_bytes) {
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

UcxRegion::UcxRegion(UcxContext& context, std::shared_ptr<void> owner, char* data, uint64_t bytes,
                     uint64_t counter_bytes)
    : context_(context), counter_bytes_(counter_bytes), owner_(std::move(owner)), data_(data) {
  ucp_mem_map_params_t p{};
  p.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  p.address = data;
  p.length = bytes;
  require(ucp_mem_map(context.context(), &p, &memory_), "registering a domain's memory");
}

UcxRegion::~UcxRegion() {
  if (!context_.is_here()) return;
  const auto enough = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
  while (!context_.abandoned() && !flush_poll() && std::chrono::steady_clock::now() < enough)
    context_.progress();
  const bool complete = !context_.abandoned() && flush_poll();
  if (!context_.dead()) {
    for (ucp_rkey_h key : mapped_) ucp_rkey_destroy(key);
    for (Peer& p : peers_)
      if (p.line) p.line->close();
  }
  // A peer that has not noticed a failure yet may still write into this region, and UCX may still use a line.
  if (complete)
    ucp_mem_unmap(context_.context(), memory_);
  else
    context_.retire(memory_, std::make_shared<std::pair<std::vector<Peer>, std::shared_ptr<void>>>(
                                 std::move(peers_), std::move(owner_)));
}

std::string UcxRegion::key() const {
  void* packed;
  size_t bytes;
  require(ucp_rkey_pack(context_.context(), memory_, &packed, &bytes), "packing a key");
  const uint64_t address = address_of(data_);
  std::string out(bytes_of(&address), sizeof(address));
  out.append(static_cast<const char*>(packed), bytes);
  ucp_rkey_buffer_release(packed);
  return out;
}

void UcxRegion::attach(const std::vector<int>& ranks, const std::vector<std::string>& keys,
                       const std::vector<char*>& mapped) {
  const char* setting = std::getenv("MOECOMM_UCX_DIRECT");
  const bool direct = !setting || std::strcmp(setting, "0") != 0;
  peers_.resize(keys.size());
  for (size_t n = 0; n < keys.size(); ++n) {
    if (ranks[n] < 0) continue;
    uint64_t address;
    ucp_rkey_h key;
    std::memcpy(&address, keys[n].data(), 8);
    require(ucp_ep_rkey_unpack(context_.endpoint(ranks[n]), keys[n].data() + 8, &key),
            "unpacking a rail peer's key");
    void* own = mapped.empty() ? nullptr : mapped[n];
    if (own || (direct && ucp_rkey_ptr(key, address, &own) == UCS_OK)) {
      peers_[n].direct = static_cast<char*>(own);
      mapped_.push_back(key);
    } else {
      peers_[n].line = std::make_shared<UcxLine>(context_, ranks[n], address, key, counter_bytes_);
    }
  }
}

void UcxRegion::put(int peer, uint64_t offset, const void* src, uint64_t bytes) noexcept {
  const Peer& p = peers_[peer];
  if (p.direct)
    std::memcpy(p.direct + offset, src, bytes);
  else
    p.line->put(offset, src, bytes);
}

void UcxRegion::get(int peer, void* to, uint64_t offset, uint64_t bytes) noexcept {
  const Peer& p = peers_[peer];
  if (p.direct)
    std::memcpy(to, p.direct + offset, bytes);
  else
    p.line->get(to, offset, bytes);
}

void UcxRegion::signal(int peer, uint64_t counter, uint64_t add) noexcept {
  const Peer& p = peers_[peer];
  if (p.direct)
    add_and_wake(p.direct, counter, add);
  else
    p.line->signal(counter, add);
}

bool UcxRegion::flush_poll() noexcept { return slow_rank() < 0; }

bool UcxRegion::drained() const noexcept {
  return std::all_of(peers_.begin(), peers_.end(),
                     [](const Peer& p) { return !p.line || p.line->in_flight() == 0; });
}

int UcxRegion::slow_rank() noexcept {
  int slow = -1;
  for (const Peer& p : peers_)
    if (p.line && !p.line->flush_poll() && slow < 0) slow = p.line->rank();
  return slow;
}

}  // namespace moecomm
