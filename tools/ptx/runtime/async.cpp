// The copy engine and its barriers, as free as their rules allow. A load reads its source when it starts, or
// when it lands; until it lands its stage holds rubbish. A store reads its stage and writes at once, or reads
// when wait_group.read asks for it and is seen by others when a proxy fence follows wait_group. Barriers
// count arrivals and bytes.
//
// Failed checks: a stage that is filled before its stores have read it; a bulk load behind an acquire or a
// meeting of lanes without a proxy fence between; bytes that no arrival expects, or that never come; shared
// memory that goes while stores read it.
#include <cstring>
#include <tuple>
#include <utility>

#include "checker.hpp"
#include "costs.hpp"
#include "trouble.hpp"

namespace simt {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // a barrier's count of them
constexpr uint64_t kHopeless = 200000;         // polls of a barrier that nothing is under way to

Mbarrier& barrier_of(Warp& w, const Ins& i, int lane, uint32_t at) {
  w.at(i, lane, Space::shared, at, 8);
  const auto found = w.block->mbarriers.find(at);
  if (found == w.block->mbarriers.end())
    w.fault(i, lane, "no mbarrier has been made at " + std::to_string(at));
  return found->second;
}
void settle(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
  b.polls = 0;
  b.ended = std::exchange(b.arriving, {});
}

void init(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    const uint32_t at = w.reg(i.r[0])[l];
    w.at(i, l, Space::shared, at, 8);
    const uint32_t count = w.reg(i.r[1])[l];
    if (count == 0 || count > kMostBytes)
      w.fault(i, l, "an mbarrier of " + std::to_string(count) + " arrivals");
    Mbarrier& b = w.block->mbarriers[at] = {count, count};
    b.maker = w.index * kLanes + l;
    if (checker()) checker()->write(w, i, l, w.block->shared.get() + at, 8);
  });
}
void expect(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    Mbarrier& b = barrier_of(w, i, l, w.reg(i.r[0])[l]);
    if (b.pending == 0) w.fault(i, l, "more arrivals than the mbarrier counts");
    b.bytes += get<uint32_t>(w.reg(i.r[1])[l]) + i.integer;
    if (b.bytes > kMostBytes) w.fault(i, l, "an mbarrier expects more bytes than it can count");
    --b.pending;
    if (checker()) checker()->arrive(w, l, b.arriving);
    settle(b);
  });
}

void land(Warp& w, const BulkLoad& load) {
  std::memcpy(w.block->shared.get() + load.to, load.early.empty() ? load.from : load.early.data(),
              load.bytes);
  Mbarrier& b = w.block->mbarriers.at(load.barrier);
  b.bytes -= load.bytes;
  if (checker()) checker()->landed(load.engine, load.at, b.arriving);
  if (b.pending == 0 && b.bytes < 0)
    w.fault(*load.ins, load.lane, "more bytes have come than the mbarrier expects");
  settle(b);
}
// Loads land in any order, sooner or later.
void progress(Warp& w) {
  auto& loads = w.block->loads;
  for (size_t k = 0; k < loads.size();)
    if (loads[k].wait-- <= 0) {
      const BulkLoad load = std::move(loads[k]);
      loads.erase(loads.begin() + k);
      land(w, load);
    } else {
      ++k;
    }
}

void try_wait(Warp& w, const Ins& i, Mask m) {
  progress(w);
  Mask ended = 0;
  each(m, [&](int l) {
    const uint32_t at = w.reg(i.r[1])[l];
    Mbarrier& b = barrier_of(w, i, l, at);
    if (b.phase != (w.reg(i.r[2])[l] & 1)) {
      ended |= Mask{1} << l;
      if (counts_costs()) wait_until(w, i, b.due);
      if (checker()) checker()->wait(w, l, b.ended);
      return;
    }
    bool coming = false;
    for (const BulkLoad& load : w.block->loads) coming |= load.barrier == at;
    if (!coming && ++b.polls > kHopeless)
      w.fault(i, l,
              "an mbarrier that never ends its phase: it waits for " + std::to_string(b.pending) +
                  " arrivals and " + std::to_string(b.bytes) + " bytes, and no load is under way");
  });
  w.predicates[i.r[0]] = (w.predicates[i.r[0]] & ~m) | ended;
}

void check_size(Warp& w, const Ins& i, int lane, uint64_t to, uint64_t from, uint32_t bytes) {
  if (bytes % 16 || to % 16 || from % 16 || bytes == 0)
    w.fault(i, lane, "a bulk copy whose size or addresses are no multiples of 16, or of no bytes");
}

void start_load(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    const uint32_t to = w.reg(i.r[0])[l], bytes = w.reg(i.r[2])[l], at = w.reg(i.r[3])[l];
    const uint64_t from = w.reg(i.r[1])[l];
    check_size(w, i, l, to, from, bytes);
    w.at(i, l, Space::shared, to, 16), w.at(i, l, Space::shared, to + bytes - 16, 16);
    const char* source = w.at(i, l, Space::global, from, 16);
    w.at(i, l, Space::global, from + bytes - 16, 16);
    if (!barrier_of(w, i, l, at).fenced)
      w.fault(i, l,
              "a bulk load whose mbarrier the engine may not know: no proxy fence is behind its making");
    if (w.engine(l).stale)
      w.fault(i, l, "a bulk load behind an acquire or a meeting of lanes, without a proxy fence between");
    const auto overlaps = [&](uint32_t other, uint32_t size) {
      return other < to + bytes && to < other + size;
    };
    for (const Warp& other : w.block->warps)
      for (const auto& e : other.engines) {
        if (!e) continue;
        for (const BulkStore& s : e->open)
          if (overlaps(s.from, s.bytes))
            w.fault(i, l,
                    "a bulk load into a stage that a store still reads, in a group that is not committed");
        for (const BulkGroup& g : e->groups)
          for (const BulkStore& s : g.stores)
            if (!s.read && overlaps(s.from, s.bytes))
              w.fault(i, l, "a bulk load into a stage that a store still reads");
      }
    for (const BulkLoad& load : w.block->loads)
      if (overlaps(load.to, load.bytes)) w.fault(i, l, "a bulk load into a stage that another load fills");
    std::memset(w.block->shared.get() + to, 0xee, bytes);
    BulkLoad load{to, source, bytes, at,
                  {}, &i,     l,     w.grid->chance(2) ? 0 : static_cast<int>(w.grid->random() % 4)};
    if (w.grid->chance(3)) load.early.assign(source, source + bytes);
    if (checker())
      load.at = checker()->load(w, i, l, source, w.block->shared.get() + to, bytes, at, load.engine);
    if (counts_costs()) bulk_loads(w, i, source, bytes, barrier_of(w, i, l, at));
    w.block->loads.push_back(std::move(load));
  });
}

void read(Warp& w, BulkStore& s) {
  if (s.read) return;
  const char* stage = w.block->shared.get() + s.from;
  s.data.assign(stage, stage + s.bytes);
  s.read = true;
}
void start_store(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    const uint64_t to = w.reg(i.r[0])[l];
    const uint32_t from = w.reg(i.r[1])[l], bytes = w.reg(i.r[2])[l];
    check_size(w, i, l, to, from, bytes);
    char* target = w.at(i, l, Space::global, to, 16);
    w.at(i, l, Space::global, to + bytes - 16, 16);
    const char* stage = w.at(i, l, Space::shared, from, 16);
    w.at(i, l, Space::shared, from + bytes - 16, 16);
    if (emulated::damage >= 0 && emulated::damage-- == 0) const_cast<char*>(stage)[0] ^= 1;
    if (w.grid->chance(3)) std::memcpy(target, stage, bytes);
    if (counts_costs()) bulk_stores(w, target);
    BulkStore s{target, from, bytes, {}, &i};
    if (checker()) std::tie(s.read_at, s.write_at) = checker()->store(w, i, l, target, stage, bytes);
    w.engine(l).open.push_back(std::move(s));
  });
}
void commit(Warp& w, const Ins&, Mask m) {
  each(m, [&](int l) {
    Engine& e = w.engine(l);
    e.groups.push_back({std::move(e.open)});
    e.open.clear();
  });
}
void wait_read(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    auto& groups = w.engine(l).groups;
    for (int64_t k = 0; k + i.integer < static_cast<int64_t>(groups.size()); ++k)
      for (BulkStore& s : groups[k].stores) {
        read(w, s);
        if (checker()) checker()->stores_read(w, l, s.read_at);
      }
  });
}
void wait_all(Warp& w, const Ins& i, Mask m) {
  wait_read(w, i, m);
  if (counts_costs()) wait_until(w, i, w.costs.stored);
  each(m, [&](int l) {
    Engine& e = w.engine(l);
    for (; static_cast<int64_t>(e.groups.size()) > i.integer; e.groups.pop_front())
      for (BulkStore& s : e.groups.front().stores) {
        if (checker()) checker()->stores_done(w, l, s.write_at);
        w.block->cache.drop(s.to, s.bytes);
        e.unseen.push_back(std::move(s));
      }
  });
}

void fence_proxy(Warp& w, const Ins&, Mask m) {
  each(m, [&](int l) {
    Engine& e = w.engine(l);
    for (const BulkStore& s : e.unseen) {
      std::memcpy(s.to, s.data.data(), s.bytes);
      w.block->cache.drop(s.to, s.bytes);
    }
    e.unseen.clear();
    e.stale = false;
    if (checker()) checker()->fence_proxy(w, l);
  });
}
// What lanes have written to shared memory: mbarriers.
void fence_shared(Warp& w, const Ins&, Mask m) {
  each(m, [&](int l) {
    for (auto& [at, b] : w.block->mbarriers) b.fenced |= b.maker == w.index * kLanes + l;
  });
}
void fence_both(Warp& w, const Ins& i, Mask m) {
  fence_shared(w, i, m);
  fence_proxy(w, i, m);
}
void nothing(Warp&, const Ins&, Mask) {}
void fence(Warp& w, const Ins& i, Mask m) {
  w.block->cache.empty();
  if (checker())
    w.fault(i, std::countr_zero(m), "the checker does not know what this fence orders; the kernels had none");
}

}  // namespace

// A lane ends: what it has started must not need shared memory any more.
void leave_engine(Warp& w, const Ins& i, int lane) {
  if (!w.engines[lane]) return;
  Engine& e = *w.engines[lane];
  for (const BulkGroup& g : e.groups)
    for (const BulkStore& s : g.stores)
      if (!s.read) w.fault(i, lane, "a lane ends while its bulk stores still read shared memory");
  if (!e.open.empty()) w.fault(i, lane, "a lane ends with bulk stores that no group has");
  for (const BulkGroup& g : e.groups)
    for (const BulkStore& s : g.stores) std::memcpy(s.to, s.data.data(), s.bytes);
  for (const BulkStore& s : e.unseen) std::memcpy(s.to, s.data.data(), s.bytes);
  e = {};
}

void add_async(std::map<std::string, Operation>& all) {
  const auto add = [&](const char* name, Handler run, Kind kind = Kind::plain) { all[name] = {run, kind}; };
  add("mbarrier.init", init), add("mbarrier.expect_tx", expect),
      add("mbarrier.try_wait", try_wait, Kind::poll);
  add("bulk.load", start_load), add("bulk.store", start_store), add("bulk.commit", commit),
      add("bulk.wait", wait_all), add("bulk.wait_read", wait_read);
  add("fence.proxy", fence_proxy), add("fence.proxy.shared", fence_shared),
      add("fence.proxy.both", fence_both), add("fence.mbarrier_init", nothing), add("fence", fence);
}

}  // namespace simt
