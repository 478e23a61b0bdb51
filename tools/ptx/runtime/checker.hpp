// Who may have seen what: happens-before between lanes, and between lanes and the copy engine, by vector
// clocks.
//
// A lane has two clocks: what is ordered before its ordinary accesses, and what is ordered before the bulk
// copies that it starts, which are another proxy. A proxy fence makes the second as far as the first. Signals
// carry both. Two accesses conflict if they overlap, one of them writes, and nothing orders them; ordered
// means by synchronization of a scope that has both lanes. Two strong accesses whose scopes have both lanes
// do not conflict. A weak load that a GPU could answer with an old value is such a conflict: it is reported,
// whatever value it has got here.
#pragma once
#include <mutex>
#include <unordered_map>

#include "machine.hpp"

namespace simt {

class Checker {
 public:
  std::recursive_mutex mutex;

  void open(Warp& w);
  void close(Warp& w, Shared& all);  // what its lanes and engines have done, into `all`
  Shared ended(int rank) { return ended_[rank]; }
  void end(int rank, const Shared& all);
  void forget(const void* p, uint64_t bytes);
  // A copy of a rank's stream writes these bytes, behind that rank's kernels.
  void copied(int rank, const void* p, uint64_t bytes);

  // Ordinary and strong accesses of a lane; `rmw` reads and writes.
  void read(Warp& w, const Ins& i, int lane, const char* p, uint32_t bytes);
  void write(Warp& w, const Ins& i, int lane, const char* p, uint32_t bytes, bool rmw = false);
  void meet(const std::vector<std::pair<Warp*, Mask>>& lanes);
  void fence_proxy(Warp& w, int lane);

  // Bulk copies; the times they return are for `landed`, `stores_read` and `stores_done`.
  uint32_t load(Warp& w, const Ins& i, int lane, const char* from, const char* stage, uint32_t bytes,
                uint32_t barrier, Agents*& engine);
  void arrive(Warp& w, int lane, Views& phase);
  void landed(Agents* engine, uint32_t at, Views& phase);
  void wait(Warp& w, int lane, const Views& phase);
  std::pair<uint32_t, uint32_t> store(Warp& w, const Ins& i, int lane, const char* to, const char* stage,
                                      uint32_t bytes);
  void stores_read(Warp& w, int lane, uint32_t at);
  void stores_done(Warp& w, int lane, uint32_t at);

  uint64_t checked = 0;

 private:
  struct Signal {
    int rank, block;
    Scope scope;
    Views views;
  };
  Agents* agents(int rank, int block, int warp, const char* what, int number, int count);
  Cell& cell(uintptr_t word);
  Views snapshot(Warp& w, int lane);
  bool seen(const Access& a, const Clock& clock, const Agents* self, int lane) const;
  void check(Warp& w, const Ins& i, int lane, const Access& mine, const std::vector<Access>& others,
             const char* first, const char* second);
  void touch(Warp& w, const Ins& i, int lane, Access mine, const char* p, uint32_t bytes, bool reads,
             bool writes);
  void acquire(Warp& w, const Ins& i, int lane, uintptr_t at);
  void release(Warp& w, const Ins& i, int lane, uintptr_t at, bool rmw);

  std::map<std::string, std::unique_ptr<Agents>> agents_;
  uint32_t agent_count_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<std::vector<Cell>>> pages_;
  std::unordered_map<uintptr_t, std::vector<Signal>> signals_;
  std::map<int, Shared> ended_;  // of a rank's kernels
};

Checker* checker();  // null: nothing is checked
void check_order(bool on);

}  // namespace simt
