// Who runs next: lanes of a warp, warps of a grid, blocks of a GPU; and where lanes meet.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "checker.hpp"
#include "costs.hpp"
#include "trouble.hpp"

namespace simt {

void leave_engine(Warp& w, const Ins& i, int lane);  // async.cpp

namespace {

// A check has failed: the kernels of all ranks end, and no rank waits for what will not come.
std::atomic<bool> broken{false};
std::atomic<int> running{0};
struct Running {
  Running() { ++running; }
  ~Running() {
    if (--running == 0) broken = false;
  }
};

}  // namespace

Settings& settings() {
  static Settings all;
  return all;
}

void Warp::fault(const Ins& i, int lane, const std::string& what) const {
  broken = true;
  throw std::runtime_error("the PTX world: " + what + "; rank " + std::to_string(grid->launch.rank) +
                           ", block " + std::to_string(block->index) + ", warp " + std::to_string(index) +
                           ", lane " + std::to_string(lane) + ", " + grid->program.where(i) + ", in " +
                           grid->kernel.name);
}

constexpr int kPollingLoop =
    64;  // instructions: who has run fewer in a turn has only looked whether others have come so far

// -- lanes
// ---------------------------------------------------------------------------------------------------------------

// Lanes that run together next: those furthest behind, so that who has parted meets again. With a seed any of
// them.
Mask Warp::choose(int& at) {
  const Mask ready = ~(exited | collecting | waiting);
  if (!ready) return 0;
  int lane = std::countr_zero(ready);
  if (grid->seed) {
    for (int skip = grid->random() % std::popcount(ready); skip > 0; --skip)
      lane = std::countr_zero(ready & ~((Mask{2} << lane) - 1));
  } else {
    each(ready, [&](int l) {
      if (pc[l] < pc[lane]) lane = l;
    });
  }
  at = pc[lane];
  Mask together = 0;
  each(ready, [&](int l) { together |= Mask{pc[l] == at} << l; });
  if (grid->seed && grid->random() % 8 == 0)
    together = (together & static_cast<Mask>(grid->random())) | Mask{1} << lane;  // or apart
  return together;
}

bool Warp::step(int budget) {
  const Ins* code = grid->program.code.data();
  int ran = 0;
  Mask polled = 0;  // lanes that have asked for something in this turn
  while (budget > 0) {
    int at = 0;
    Mask lanes = choose(at);
    lanes &= ~polled;
    if (!lanes && polled) {  // lanes that wait behind the polling ones
      const Mask others = ~(exited | collecting | waiting | polled);
      if (!others) return ran > kPollingLoop;
      at = pc[std::countr_zero(others)];
      each(others, [&](int l) {
        if (pc[l] < at) at = pc[l];
      });
      each(others, [&](int l) { lanes |= Mask{pc[l] == at} << l; });
    }
    if (!lanes) return ran > kPollingLoop;
    int next = INT32_MAX;  // where others stand
    each(~(exited | collecting | waiting | lanes | polled), [&](int l) {
      if (pc[l] >= at && pc[l] < next) next = pc[l];
    });
    const bool apart = grid->seed != 0;
    int turn = apart ? 1 + static_cast<int>(grid->random() % 64) : INT32_MAX;
    for (bool together = true; together && budget > 0 && turn > 0 && (apart || at < next);
         --budget, --turn, ++ran) {
      const Ins& i = code[at];
      i.reached = true;
      if (counts_costs()) issue(*this, i);
      Mask m = lanes;
      if (i.guard >= 0 || i.guard < -1) {
        const int g = i.guard >> 1;  // -1 and -2 as predicates: false and true
        m &= i.guard & 1 ? ~pred(g) : pred(g);
      }
      switch (i.kind) {
        case Kind::plain:
          if (m) i.run(*this, i, m);
          ++at;
          break;
        case Kind::branch:
          if (m == lanes) {
            if (i.integer <= at)
              next = INT32_MAX, each(~(exited | collecting | waiting | lanes | polled), [&](int l) {
                if (pc[l] >= i.integer && pc[l] < next) next = pc[l];
              });
            at = i.integer;
          } else if (!m) {
            ++at;
          } else {
            each(lanes, [&](int l) { pc[l] = m >> l & 1 ? static_cast<int>(i.integer) : at + 1; });
            together = false;
          }
          break;
        case Kind::poll:
          if (m) i.run(*this, i, m);
          ++at;
          if (i.order == Order::weak || i.order == Order::is_volatile) {  // an ordinary load
            break;
          }
          each(lanes, [&](int l) { pc[l] = at; });
          polled |= lanes;
          together = false;
          break;
        case Kind::call:
          each(lanes, [&](int l) { back[l].push_back(at + 1), pc[l] = i.integer; });
          together = false;
          break;
        case Kind::leave:
          each(lanes, [&](int l) { pc[l] = at + 1; });
          each(m, [&](int l) {
            if (back[l].empty()) {
              leave_engine(*this, i, l);
              exited |= Mask{1} << l;
            } else {
              pc[l] = back[l].back();
              back[l].pop_back();
            }
          });
          together = false;
          break;
        case Kind::collective:
        case Kind::barrier:
          each(lanes, [&](int l) { pc[l] = at + !(m >> l & 1); });
          if (m) i.kind == Kind::barrier ? meet_block(i, m) : meet(i, at, m);
          together = false;
          break;
      }
      if (together && !(budget > 1 && turn > 1 && (apart || at < next)))
        each(lanes, [&](int l) { pc[l] = at; });
    }
  }
  return true;
}

// Lanes come to a collective of their warp; it is done when all members are there. Who has exited is not
// waited for.
bool Warp::meet(const Ins& i, int at, Mask lanes) {
  collecting |= lanes;
  const int member_place = grid->program.code[at].r[6];
  const Mask members = static_cast<Mask>(reg(member_place)[std::countr_zero(lanes)]);
  each(lanes, [&](int l) {
    if (!(members >> l & 1)) fault(i, l, "a lane meets others, and is no member itself");
    if (static_cast<Mask>(reg(member_place)[l]) != members)
      fault(i, l, "lanes meet with different masks of members");
  });
  if ((collecting & members) != (members & ~exited)) return false;
  each(members & ~exited, [&](int l) {
    const Ins& other = grid->program.code[pc[l]];
    if (other.op != i.op || (pc[l] != at && std::strcmp(operation_names()[i.op].c_str(), "bar.warp")))
      fault(i, l,
            "lanes of a warp meet at different instructions; one of them at " + grid->program.where(other));
  });
  if (i.run) i.run(*this, i, members & ~exited);
  each(members & ~exited, [&](int l) { ++pc[l]; });
  collecting &= ~members;
  return true;
}

bool Warp::meet_block(const Ins& i, Mask lanes) {
  const int first = std::countr_zero(lanes);
  const uint32_t id = reg(i.r[0])[first], threads = reg(i.r[1])[first];
  each(lanes, [&](int l) {
    if (get<uint32_t>(reg(i.r[0])[l]) != id || get<uint32_t>(reg(i.r[1])[l]) != threads)
      fault(i, l, "lanes of a warp name different barriers");
  });
  if (id > 15 || threads % kLanes || threads == 0)
    fault(i, first,
          "barrier " + std::to_string(id) + " of " + std::to_string(threads) +
              " threads; there are 16, of whole warps");
  NamedBarrier& b = block->barriers[id];
  if (b.arrived && b.expected != static_cast<int>(threads))
    fault(i, first,
          "a barrier of " + std::to_string(b.expected) + " and of " + std::to_string(threads) + " threads");
  b.expected = static_cast<int>(threads);
  b.arrived += std::popcount(lanes);
  b.lanes.emplace_back(this, lanes);
  waiting |= lanes;
  if (b.arrived < b.expected) return true;
  if (b.arrived > b.expected) fault(i, first, "more threads come to a barrier than it is of");
  if (checker()) checker()->meet(b.lanes);
  for (const auto& [warp, mask] : b.lanes) {
    each(mask, [&](int l) { ++warp->pc[l], warp->engine(l).stale = true; });
    warp->waiting &= ~mask;
  }
  b = {};
  return true;
}

namespace {

void bar_warp(Warp& w, const Ins&, Mask m) {
  if (checker()) checker()->meet({{&w, m}});
  each(m, [&](int l) {
    if (w.engines[l]) w.engines[l]->stale = true;
  });
  if (m & 1) w.engine(0).stale = true;
}
template <bool kXor>
void shuffle(Warp& w, const Ins& i, Mask m) {
  uint64_t values[kLanes];
  std::memcpy(values, w.reg(i.r[2]), sizeof(values));
  each(m, [&](int l) {
    const uint32_t b = w.reg(i.r[3])[l] & 31, c = w.reg(i.r[4])[l], clamp = c & 31, segment = c >> 8 & 31;
    const uint32_t most = (static_cast<uint32_t>(l) & segment) | (clamp & ~segment),
                   least = static_cast<uint32_t>(l) & segment;
    const uint32_t from = kXor ? static_cast<uint32_t>(l) ^ b : least | (b & ~segment);
    const bool valid = from <= most;
    const uint32_t source = valid ? from : static_cast<uint32_t>(l);
    if (!(m >> source & 1))
      w.fault(i, l, "a shuffle from lane " + std::to_string(source) + ", which takes no part");
    w.reg(i.r[0])[l] = static_cast<uint32_t>(values[source]);
    if (i.r[1] >= 0) w.predicates[i.r[1]] = (w.predicates[i.r[1]] & ~(Mask{1} << l)) | Mask{valid} << l;
  });
}
template <bool kAny>
void vote(Warp& w, const Ins& i, Mask m) {
  const Mask yes = w.pred(i.r[1]) & m;
  const bool found = kAny ? yes != 0 : yes == m;
  w.predicates[i.r[0]] = found ? w.predicates[i.r[0]] | m : w.predicates[i.r[0]] & ~m;
}
void clock(Warp& w, const Ins& i, Mask m) {
  const uint64_t now = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
  each(m, [&](int l) { w.reg(i.r[0])[l] = now; });
}

}  // namespace

void add_control(std::map<std::string, Operation>& all) {
  all["bra"] = {nullptr, Kind::branch}, all["call"] = {nullptr, Kind::call},
  all["ret"] = {nullptr, Kind::leave};
  all["barrier"] = {nullptr, Kind::barrier}, all["bar.warp"] = {bar_warp, Kind::collective},
  all["globaltimer"] = {clock, Kind::plain};
  all["shfl.idx"] = {shuffle<false>, Kind::collective}, all["shfl.bfly"] = {shuffle<true>, Kind::collective};
  all["vote.any"] = {vote<true>, Kind::collective}, all["vote.all"] = {vote<false>, Kind::collective};
}

// -- blocks
// --------------------------------------------------------------------------------------------------------------

namespace {

// Multiprocessors of the GPU that all ranks of this process share: a block has one to itself.
class Room {
 public:
  bool take() {
    std::lock_guard lock(mutex_);
    if (taken_ >= settings().room) return false;
    ++taken_;
    return true;
  }
  void give(int blocks) {
    std::lock_guard lock(mutex_);
    taken_ -= blocks;
  }

 private:
  std::mutex mutex_;
  int taken_ = 0;
};
Room room;
std::atomic<uint64_t> launches{0};

// One warp at a time, of all ranks: what the checker keeps has no other order.
std::unique_lock<std::recursive_mutex> locked() {
  return checker()        ? std::unique_lock(checker()->mutex)
         : counts_costs() ? std::unique_lock(costs_mutex())
                          : std::unique_lock<std::recursive_mutex>();
}

}  // namespace

thread_local int Grid::latest_rank = -1;

Grid::Grid(const Launch& launch)
    : launch(launch),
      program(*launch.program),
      kernel(program.entry(launch.kernel)),
      seed(emulated::order_seed ? emulated::order_seed.load() : settings().seed),
      random(seed * 1000003 + launches++) {
  if (launch.parameters.size() != kernel.parameter_bytes)
    throw std::runtime_error("the PTX world: " + launch.kernel + " is given " +
                             std::to_string(launch.parameters.size()) + " bytes of parameters; its PTX has " +
                             std::to_string(kernel.parameter_bytes));
}

Block& Grid::open_block(int index) {
  Block& b = resident.emplace_back();
  b.index = index;
  b.shared_bytes = (program.shared_bytes + 127) / 128 * 128 + launch.shared_bytes;
  b.shared = {static_cast<char*>(std::aligned_alloc(4096, (b.shared_bytes + 4096) / 4096 * 4096)), std::free};
  std::memset(b.shared.get(), 0xdb, b.shared_bytes);
  for (int k = 0; k < launch.threads / kLanes; ++k) {
    Warp& w = b.warps.emplace_back();
    w.grid = this;
    w.block = &b;
    w.index = k;
    w.file.resize(int64_t{program.slots} * kLanes);
    w.predicates.resize(program.predicates);
    w.locals.resize(program.local_bytes * kLanes);
    for (const auto& [slot, value] : program.constants) std::fill_n(w.reg(slot), kLanes, value);
    if (checker()) checker()->open(w);
    for (int l = 0; l < kLanes; ++l) {
      w.reg(0)[l] = k * kLanes + l, w.reg(1)[l] = launch.threads, w.reg(2)[l] = index,
      w.reg(3)[l] = launch.blocks;
      w.pc[l] = kernel.begin;
    }
  }
  return b;
}

void Grid::run() {
  int begun = 0, held = 0;
  latest_rank = launch.rank;
  const Running here;
  const auto finish = [&] { room.give(held); };
  if (checker()) {
    const auto lock = locked();
    before = checker()->ended(launch.rank);
    for (const Extent& e : launch.extents)
      checker()->forget(e.begin, e.bytes);  // its own, and the host is behind
  }
  try {
    while (begun < launch.blocks || !resident.empty()) {
      if (broken) throw std::runtime_error("the PTX world: a check of another kernel has failed");
      bool moved = false, ready = false;
      while (begun < launch.blocks && static_cast<int>(resident.size()) < settings().room && room.take()) {
        ++held;
        const auto lock = locked();
        open_block(begun++);
        moved = true;
      }
      std::vector<Warp*> warps;
      for (Block& b : resident)
        for (Warp& w : b.warps)
          if (!w.done()) warps.push_back(&w);
      if (seed) std::shuffle(warps.begin(), warps.end(), random);
      for (Warp* w : warps) {
        if (~(w->exited | w->collecting | w->waiting)) ready = true;
        const auto lock = locked();
        moved |= w->step(seed ? 1 + static_cast<int>(random() % 400) : 20000);
      }
      for (size_t k = 0; k < resident.size();)
        if (resident[k].done()) {
          if (!resident[k].loads.empty())
            throw std::runtime_error("the PTX world: a block ends while bulk loads are under way");
          if (checker()) {
            const auto lock = locked();
            for (Warp& w : resident[k].warps) checker()->close(w, after);
            checker()->forget(resident[k].shared.get(), resident[k].shared_bytes);
          }
          resident.erase(resident.begin() + k);
          room.give(1);
          --held;
        } else {
          ++k;
        }
      if (!moved && !ready && !resident.empty()) {
        for (Block& b : resident)
          for (Warp& w : b.warps)
            if (const Mask stuck = w.collecting | w.waiting) {
              const int l = std::countr_zero(stuck);
              w.fault(program.code[w.pc[l]], l,
                      "a deadlock: these lanes wait for lanes that have left, or that wait elsewhere");
            }
      }
      if (!moved) sched_yield();
    }
    if (checker()) {
      const auto lock = locked();
      checker()->end(launch.rank, after);
    }
  } catch (...) {
    finish();
    throw;
  }
}

}  // namespace simt
