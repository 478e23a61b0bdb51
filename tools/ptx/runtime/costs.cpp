#include "costs.hpp"

#include <algorithm>
#include <atomic>

namespace simt {
namespace {

std::atomic<bool> counting{false};

// Which clock an access costs: 0 where a peer has the memory, else 1.
int side(const Warp& w, const char* p) {
  for (const Extent& e : w.grid->launch.peers) {
    const char* begin = static_cast<const char*>(e.begin);
    if (p >= begin && p < begin + e.bytes) return 0;
  }
  return 1;
}

}  // namespace

bool counts_costs() { return counting.load(std::memory_order_relaxed); }
void count_costs(bool on) { counting = on; }
std::recursive_mutex& costs_mutex() {
  static std::recursive_mutex one;
  return one;
}

void wait_until(Warp& w, const Ins& i, const uint32_t (&due)[2]) {
  for (int c = 0; c < 2; ++c)
    if (due[c] > w.costs.now[c]) {
      i.cost.waits[c] += due[c] - w.costs.now[c];
      w.costs.now[c] = due[c];
    }
}

void issue(Warp& w, const Ins& i) {
  auto& ready = w.costs.ready;
  if (ready.empty()) ready.resize(w.grid->program.slots);
  ++i.cost.runs;
  uint32_t due[2] = {};
  for (int k = 0; k < 7; ++k)
    if (i.reads >> k & 1 && i.r[k] >= 0)
      for (int c = 0; c < 2; ++c) due[c] = std::max(due[c], ready[i.r[k]][c]);
  wait_until(w, i, due);
  for (int k = 0; k < 7; ++k)
    if (i.writes >> k & 1 && i.r[k] >= 0) ready[i.r[k]] = {w.costs.now[0], w.costs.now[1]};
}

void loads(Warp& w, const Ins& i, const char* p, uint64_t bytes) {
  const int c = side(w, p);
  i.cost.bytes[c] += bytes;
  for (int k = 0; k < 7; ++k)
    if (i.writes >> k & 1 && i.r[k] >= 0) w.costs.ready[i.r[k]][c] = w.costs.now[c] + 1;
}

void bulk_loads(Warp& w, const Ins& i, const char* p, uint64_t bytes, Mbarrier& b) {
  const int c = side(w, p);
  i.cost.bytes[c] += bytes;
  b.due[c] = std::max(b.due[c], w.costs.now[c] + 1);
}

void bulk_stores(Warp& w, const char* p) {
  const int c = side(w, p);
  w.costs.stored[c] = w.costs.now[c] + 1;
}

}  // namespace simt
