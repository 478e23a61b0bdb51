// Stands in for the part of NCCL's device headers that the GIN rail uses, on a CPU, so that tests run the
// rail's own code. The network uses all freedom that GIN's rules allow. Requests wait in a queue per (rank,
// context, peer), and the queues are served in random order. The puts of a queue are executed in any order
// and read their sources only then. A strong signal comes after the earlier puts of its queue and is not
// ordered otherwise; it may even overtake these if its window is not registered as strictly ordered. A flush
// waits until the calling rank's queues of its context are empty.
#pragma once
#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "fabric/cuda/ptx.cuh"
#include "nccl.h"

namespace cuda {
enum memory_order { memory_order_acquire };
}

namespace emulated {

class Gin {
 public:
  Gin(int ranks, int contexts, uint64_t seed)
      : ranks_(ranks), contexts_(contexts), random_(seed), queues_(ranks * contexts * ranks) {
    thread_ = std::jthread([this](std::stop_token stop) { serve(stop); });
  }
  ~Gin() {
    thread_.request_stop();
    {
      std::lock_guard lock(
          mutex_);  // else the thread may miss the notification between its check and its sleep
    }
    changed_.notify_all();
  }
  struct Request {
    char* to;
    const char* from;  // null: a signal, or a value
    uint64_t value, bytes;
    bool signal;
    bool strict = true;  // of a signal: its window is strictly ordered
  };
  // While it is held, no request is executed. until_signal: release it until the next signal has been
  // executed, so that a test can inspect the memory at that moment.
  void hold(bool held, bool until_signal = false) {
    {
      std::lock_guard lock(mutex_);
      held_ = held;
      until_signal_ = until_signal;
    }
    changed_.notify_all();
  }
  void post(int rank, int context, int peer, const Request& r) {
    {
      std::lock_guard lock(mutex_);
      queue(rank, context, peer).push_back(r);
    }
    changed_.notify_all();
  }
  void flush(int rank, int context) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] {
      for (int p = 0; p < ranks_; ++p)
        if (!queue(rank, context, p).empty()) return false;
      return true;
    });
  }

 private:
  std::vector<Request>& queue(int rank, int context, int peer) {
    return queues_[(rank * contexts_ + context) * ranks_ + peer];
  }
  void serve(std::stop_token stop) {
    std::unique_lock lock(mutex_);
    while (!stop.stop_requested()) {
      std::vector<std::vector<Request>*> busy;
      for (auto& q : queues_)
        if (!q.empty()) busy.push_back(&q);
      if (busy.empty() || held_) {
        changed_.wait(lock);
        continue;
      }
      auto& q = *busy[random_() % busy.size()];
      // The requests that may be executed now: any before the queue's first strict signal, or that signal if
      // it is the first request.
      const size_t puts =
          std::find_if(q.begin(), q.end(), [](const Request& r) { return r.signal && r.strict; }) - q.begin();
      const size_t at = puts == 0 ? 0 : random_() % puts;
      held_ = until_signal_ && q[at].signal;
      land(q[at]);
      q.erase(q.begin() + at);
      lock.unlock();
      changed_.notify_all();
      std::this_thread::yield();
      lock.lock();
    }
  }
  static void land(const Request& r) {
    if (r.signal)
      __atomic_fetch_add(reinterpret_cast<uint64_t*>(r.to), r.value, __ATOMIC_RELEASE);
    else if (r.from)
      std::memcpy(r.to, r.from, r.bytes);
    else
      __atomic_store_n(reinterpret_cast<uint64_t*>(r.to), r.value, __ATOMIC_RELEASE);
  }

  int ranks_, contexts_;
  std::mt19937_64 random_;
  std::vector<std::vector<Request>> queues_;
  bool held_ = false, until_signal_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::jthread thread_;
};

}  // namespace emulated

struct ncclDevComm {
  int rank;
  uint32_t ginContextCount;
  emulated::Gin* gin;
};
struct ncclGin_None {};
struct ncclCoopThread {};
struct ncclGinDescriptorSmem {
  alignas(64) char space[128];
};
struct ncclGin_DescriptorSmem {
  ncclGinDescriptorSmem* descriptor;
};
struct ncclGin_StrongVASignalAdd {
  ncclWindow_t signalWindow;
  size_t signalOffset;
  uint64_t value;
};

struct ncclGin {
  const ncclDevComm& comm;
  int context;
  ncclGin(const ncclDevComm& comm, int context) : comm(comm), context(context) {}

  void put(ncclTeam team, int peer, ncclWindow_t to, size_t to_offset, ncclWindow_t from, size_t from_offset,
           size_t bytes, ncclGin_None, ncclGin_None, ncclCoopThread, ncclGin_DescriptorSmem d) const {
    post(team, peer, d,
         {to->base[world(team, peer)] + to_offset, from->base[comm.rank] + from_offset, 0, bytes, false});
  }
  void get(ncclTeam team, int peer, ncclWindow_t of, size_t of_offset, ncclWindow_t to, size_t to_offset,
           size_t bytes, ncclCoopThread, ncclGin_DescriptorSmem d) const {
    post(team, peer, d,
         {to->base[comm.rank] + to_offset, of->base[world(team, peer)] + of_offset, 0, bytes, false});
  }
  void putValue(ncclTeam team, int peer, ncclWindow_t to, size_t offset, uint64_t value, ncclGin_None,
                ncclCoopThread, ncclGin_DescriptorSmem d) const {
    post(team, peer, d, {to->base[world(team, peer)] + offset, nullptr, value, 8, false});
  }
  void signal(ncclTeam team, int peer, ncclGin_StrongVASignalAdd s, ncclCoopThread,
              ncclGin_DescriptorSmem d) const {
    post(team, peer, d,
         {s.signalWindow->base[world(team, peer)] + s.signalOffset, nullptr, s.value, 8, true,
          (s.signalWindow->flags & NCCL_WIN_STRICT_ORDERING) != 0});
  }
  ncclResult_t flush(ncclCoopThread, cuda::memory_order, ncclGin_DescriptorSmem, uint64_t) const {
    comm.gin->flush(comm.rank, context);
    return ncclSuccess;
  }

 private:
  int world(ncclTeam team, int peer) const { return comm.rank + (peer - team.rank) * team.stride; }
  void post(ncclTeam team, int peer, ncclGin_DescriptorSmem d, const emulated::Gin::Request& r) const {
    CHECK(emulated::engine().quiet());  // the network must see everything that a release would publish
    std::memset(d.descriptor, 0xee, sizeof(*d.descriptor));  // NCCL builds its request there
    comm.gin->post(comm.rank, context, world(team, peer), r);
  }
};
