// The rail over UCX: one-sided puts and counters between ranks with the same local rank on different nodes.
// UCX_TLS chooses the transport (posix shared memory, tcp, InfiniBand) at run time.
//
// UcxContext  One per communicator: the worker, the endpoints (to the rail peers, and to other ranks when
//             they are first needed), and a thread that makes progress between calls, because a put over tcp
//             needs the target's help to complete. The thread sleeps until something arrives.
// UcxRegion   Memory that a set of peers write into.
//
// Construction throws std::runtime_error. The data path never throws: a failed endpoint sets failed(rank),
// which every wait checks.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fabric/cpu/process.hpp"

typedef struct ucp_context* ucp_context_h;
typedef struct ucp_worker* ucp_worker_h;
typedef struct ucp_ep* ucp_ep_h;
typedef struct ucp_rkey* ucp_rkey_h;
typedef struct ucp_mem* ucp_mem_h;

namespace moecomm {

class UcxLine;

class UcxContext {
 public:
  UcxContext();  // the slow part: creates a worker, before the communicator is known
  // The caller of any function that uses the worker must hold `calls`.
  void enter(std::timed_mutex& calls, int size);
  ~UcxContext();  // closes by force and in bounded time: a dead peer cannot delay it
  UcxContext(const UcxContext&) = delete;
  UcxContext& operator=(const UcxContext&) = delete;

  std::string address() const;
  void connect(int rank, const std::string& address);  // once per rank; the caller holds `calls`
  void serve();                                        // starts the thread

  bool progress() noexcept;  // true if something moved
  // For a wait for `rank`: a rank whose connection is gone, or -1.
  int lost(int rank) const noexcept;
  // UCX called abort() (fabric/cpu/ucx_rescue.hpp). No UCX object of this context is used any more.
  bool dead() const noexcept { return dead_; }
  bool failed(int rank) const noexcept {
    return rank >= 0 && links_[rank].failed.load(std::memory_order_acquire);
  }
  void fail(int rank) noexcept { links_[rank].failed.store(true, std::memory_order_release); }
  // After a final failure: closes every endpoint by force, so that UCX no longer reads callers' memory or
  // writes to regions. Takes bounded time; the caller holds `calls`.
  void abandon() noexcept;
  bool abandoned() const noexcept { return abandoned_; }
  // Keeps memory, and objects that UCX may still use, as long as the worker.
  void retire(ucp_mem_h memory, std::shared_ptr<void> rest);
  static std::string version();

  ucp_context_h context() const { return context_; }
  ucp_worker_h worker() const { return worker_; }
  ucp_ep_h endpoint(int rank) const { return links_[rank].endpoint; }
  bool is_here() const { return process_.is_here(); }

 private:
  struct Link {
    UcxContext* context = nullptr;
    int rank = -1;
    ucp_ep_h endpoint = nullptr;
    std::atomic<bool> failed{false};
  };
  friend void on_endpoint_error(void* arg, ucp_ep_h endpoint, int status);
  void serve_loop() noexcept;
  Process process_;
  std::timed_mutex* calls_ = nullptr;
  std::thread server_;
  int stop_ = -1;  // eventfd
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  std::vector<Link> links_;  // by rank; not resized after enter(): endpoints point into it
  bool abandoned_ = false, dead_ = false;
  std::vector<std::pair<ucp_mem_h, std::shared_ptr<void>>> retired_;
};

class UcxRegion {
 public:
  // Allocated by UCX, so that a put from the same host over shared memory is a plain copy into it. Counters
  // are in its first counter_bytes.
  UcxRegion(UcxContext& context, uint64_t bytes, uint64_t counter_bytes);
  // Uses memory that `owner` keeps. It must be zero-filled.
  UcxRegion(UcxContext& context, std::shared_ptr<void> owner, char* data, uint64_t bytes,
            uint64_t counter_bytes);
  ~UcxRegion();
  UcxRegion(const UcxRegion&) = delete;
  UcxRegion& operator=(const UcxRegion&) = delete;

  void* data() const { return data_; }
  std::string key() const;
  // Lists by peer; rank -1: not a peer. mapped: addresses at which the caller has mapped the peers' memory,
  // or null.
  void attach(const std::vector<int>& ranks, const std::vector<std::string>& keys,
              const std::vector<char*>& mapped = {});

  // The peer's memory if UCX can map it (same host), else null. signal() orders stores there.
  char* reach(int peer) const noexcept { return peers_[peer].direct; }
  // The source must not change until drained() or flush_poll() returns true.
  void put(int peer, uint64_t offset, const void* src, uint64_t bytes) noexcept;
  // The bytes have arrived when drained() returns true.
  void get(int peer, void* to, uint64_t offset, uint64_t bytes) noexcept;
  // Adds to a counter of the peer's region, after all earlier puts to that peer. One writer per counter.
  void signal(int peer, uint64_t counter, uint64_t add) noexcept;
  // Whether every put and signal so far is complete at the peers. Never blocks.
  bool flush_poll() noexcept;
  // Whether the sources of all puts may be overwritten and all gets are complete. Never blocks.
  bool drained() const noexcept;
  // A peer at which puts or signals are not complete, or -1.
  int slow_rank() noexcept;

 private:
  struct Peer {
    char* direct = nullptr;         // see reach()
    std::shared_ptr<UcxLine> line;  // used if `direct` is null
  };
  UcxContext& context_;
  uint64_t counter_bytes_;
  std::shared_ptr<void> owner_;  // of the memory; null: UCX
  ucp_mem_h memory_ = nullptr;
  void* data_ = nullptr;
  std::vector<Peer> peers_;
  std::vector<ucp_rkey_h> mapped_;  // keys of the direct mappings
};

}  // namespace moecomm
