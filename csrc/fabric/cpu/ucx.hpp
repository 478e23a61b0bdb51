// The rail over UCX: one-sided puts and counters between ranks of the same local index on different
// nodes. UCX_TLS chooses the transport (posix shared memory, tcp, InfiniBand) at run time.
//
// UcxContext  one per communicator: worker, endpoints (to the rail peers; to other ranks once something
//             wants to reach them), and a thread that serves them between calls (a put over tcp needs the
//             target's help to land); it sleeps until something comes
// UcxRegion   memory that a set of peers write into
//
// Construction throws std::runtime_error; the data path never throws: a failed endpoint latches in
// failed(rank), which every wait above looks at.
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
  UcxContext(std::timed_mutex& calls, int size);  // `calls` is held by whoever uses the worker
  ~UcxContext();  // closes by force and bounded: a dead peer cannot hold it up
  UcxContext(const UcxContext&) = delete;
  UcxContext& operator=(const UcxContext&) = delete;

  std::string address() const;
  void connect(int rank, const std::string& address);  // once per rank; the caller holds `calls`
  void serve();                                        // starts the thread

  bool progress() noexcept;  // true when something moved
  // The rank whose connection is gone, where this one waits for `rank`; -1: none.
  int lost(int rank) const noexcept;
  // UCX wanted to end the process (fabric/cpu/ucx_rescue.hpp): nothing of this context is used any more.
  bool dead() const noexcept { return dead_; }
  bool failed(int rank) const noexcept {
    return rank >= 0 && links_[rank].failed.load(std::memory_order_acquire);
  }
  void fail(int rank) noexcept { links_[rank].failed.store(true, std::memory_order_release); }
  // After a failure that is final: closes every endpoint by force, so that nothing is read from a caller's
  // memory or written into ours any more. Bounded; the caller holds `calls`.
  void abandon() noexcept;
  bool abandoned() const noexcept { return abandoned_; }
  // Memory, and what else UCX may still touch, that must live as long as the worker.
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
  std::timed_mutex& calls_;
  std::thread server_;
  int stop_ = -1;  // eventfd
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  std::vector<Link> links_;  // by rank; never resized: endpoints point into it
  bool abandoned_ = false, dead_ = false;
  std::vector<std::pair<ucp_mem_h, std::shared_ptr<void>>> retired_;
};

class UcxRegion {
 public:
  // Allocated by UCX, so that a put from the same host over shared memory is a plain copy into it.
  // Counters lie in its first counter_bytes.
  UcxRegion(UcxContext& context, uint64_t bytes, uint64_t counter_bytes);
  ~UcxRegion();
  UcxRegion(const UcxRegion&) = delete;
  UcxRegion& operator=(const UcxRegion&) = delete;

  void* data() const { return data_; }
  std::string key() const;
  void attach(const std::vector<int>& ranks,
              const std::vector<std::string>& keys);  // by peer; rank -1: not a peer

  // The peer's memory itself, where UCX can map it (same host), else null. Stores there are ordered by
  // signal().
  char* reach(int peer) const noexcept { return peers_[peer].direct; }
  // The source must stay as it is until flush_poll() says true.
  void put(int peer, uint64_t offset, const void* src, uint64_t bytes) noexcept;
  // Adds to a counter of the peer's region, after all earlier puts to that peer. One writer per counter.
  void signal(int peer, uint64_t counter, uint64_t add) noexcept;
  // True when every put and signal so far is complete at the peers. Never blocks.
  bool flush_poll() noexcept;
  // A peer that has not taken all that was put for it, or -1.
  int slow_rank() noexcept;

 private:
  struct Peer {
    char* direct = nullptr;         // see reach()
    std::shared_ptr<UcxLine> line;  // where there is no such memory
  };
  UcxContext& context_;
  uint64_t counter_bytes_;
  ucp_mem_h memory_ = nullptr;
  void* data_ = nullptr;
  std::vector<Peer> peers_;
  std::vector<ucp_rkey_h> mapped_;  // keys that a direct mapping rests on
};

}  // namespace moecomm
