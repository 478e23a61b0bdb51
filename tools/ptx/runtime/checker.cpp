#include "checker.hpp"

#include <algorithm>
#include <stdexcept>

namespace simt {
namespace {

constexpr uintptr_t kPage = 4096;
std::unique_ptr<Checker> the_checker;

uint32_t time_of(const Clock& c, uint32_t agent) { return agent < c.size() ? c[agent] : 0; }
void join(Clock& to, const Shared& from) {
  if (!from) return;
  if (to.size() < from->size()) to.resize(from->size());
  for (size_t k = 0; k < from->size(); ++k)
    if ((*from)[k] > to[k]) to[k] = (*from)[k];
}
Shared joined(const Shared& a, const Shared& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  Clock c = *a;
  join(c, b);
  return std::make_shared<const Clock>(std::move(c));
}
Shared advanced(const Shared& a, uint32_t agent, uint32_t time) {
  Clock c = a ? *a : Clock();
  if (c.size() <= agent) c.resize(agent + 1);
  if (c[agent] < time) c[agent] = time;
  return std::make_shared<const Clock>(std::move(c));
}
// Whether a scope of (rank, block) has the other one in it.
bool has(Scope s, int rank, int block, int other_rank, int other_block) {
  return s == Scope::sys ||
         (rank == other_rank && (s == Scope::gpu || (s == Scope::cta && block == other_block)));
}
bool is_strong(const Ins& i) { return i.order != Order::weak; }

}  // namespace

Checker* checker() { return the_checker.get(); }
void check_order(bool on) { the_checker = on ? std::make_unique<Checker>() : nullptr; }

Agents* Checker::agents(int rank, int block, int warp, const char* what, int number, int count) {
  const std::string key = std::to_string(rank) + "/" + std::to_string(block) + "/" + std::to_string(warp) +
                          "/" + what + "/" + std::to_string(number);
  auto& found = agents_[key];
  if (!found) {
    found = std::make_unique<Agents>(Agents{rank, block, warp, what, agent_count_});
    agent_count_ += count;
  }
  return found.get();
}

// A kernel begins behind everything that its rank's kernels have done: streams are joined by the host.
void Checker::open(Warp& w) {
  w.order.lanes = agents(w.grid->launch.rank, w.block->index, w.index, "lane", 0, kLanes);
  const Shared& before = w.grid->before;
  for (Views& v : w.order.views) v = {before, before};
}
void Checker::close(Warp& w, Shared& all) {
  Clock sum;
  join(sum, all);
  for (int l = 0; l < kLanes; ++l) {
    join(sum, snapshot(w, l).plain);
    for (const Agents* a : {w.order.store_reads[l], w.order.store_writes[l]})
      if (a) {
        if (sum.size() <= a->base) sum.resize(a->base + 1);
        sum[a->base] = a->now;
      }
  }
  all = std::make_shared<const Clock>(std::move(sum));
}
void Checker::end(int rank, const Shared& all) { ended_[rank] = joined(ended_[rank], all); }

void Checker::forget(const void* p, uint64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t page = begin / kPage * kPage; page < end; page += kPage) {
    const auto found = pages_.find(page);
    if (found == pages_.end()) continue;
    for (uintptr_t word = std::max(page, begin) / 4 * 4; word < std::min(page + kPage, end); word += 4)
      (*found->second)[(word - page) / 4] = {};
  }
  if (bytes / 8 < signals_.size()) {
    for (uintptr_t at = (begin + 3) / 4 * 4; at < end; at += 4) signals_.erase(at);
  } else {
    std::erase_if(signals_, [&](const auto& s) { return s.first >= begin && s.first < end; });
  }
}

void Checker::copied(int rank, const void* p, uint64_t bytes) {
  static const Clock nothing;
  const Shared& done = ended_[rank];
  const Clock& clock = done ? *done : nothing;
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t word = begin / 4 * 4; word < end; word += 4) {
    const auto page = pages_.find(word / kPage * kPage);
    if (page == pages_.end()) {
      word = word / kPage * kPage + kPage - 4;
      continue;
    }
    const Cell& c = (*page->second)[word % kPage / 4];
    for (const auto* all : {&c.writes, &c.reads})
      for (const Access& a : *all)
        if (!seen(a, clock, nullptr, -1))
          throw std::runtime_error("the PTX world: nothing orders these: an access by rank " +
                                   std::to_string(a.by->rank) + ", PTX line " + std::to_string(a.ins->line) +
                                   "; and a copy of rank " + std::to_string(rank) + "'s stream");
  }
}

Cell& Checker::cell(uintptr_t word) {
  auto& page = pages_[word / kPage * kPage];
  if (!page) page = std::make_unique<std::vector<Cell>>(kPage / 4);
  return (*page)[word % kPage / 4];
}

// What others may see once they have seen this lane's signal; time goes on behind it.
Views Checker::snapshot(Warp& w, int lane) {
  Agents& own = *w.order.lanes;
  Views v = w.order.views[lane];
  v.plain = advanced(v.plain, own.base + lane, own.now);
  ++own.now;
  return v;
}

bool Checker::seen(const Access& a, const Clock& clock, const Agents* self, int lane) const {
  bool all = true;
  each(a.lanes, [&](int l) {
    if (a.by == self && l == lane) return;  // program order
    all &= time_of(clock, a.by->base + l) >= a.at;
  });
  return all;
}

namespace {

std::string told(const Program& p, const Access& a, const char* what) {
  std::string lanes;
  each(a.lanes, [&](int l) { lanes += (lanes.empty() ? "" : ",") + std::to_string(l); });
  return std::string(what) + " by rank " + std::to_string(a.by->rank) + ", block " +
         std::to_string(a.by->block) + ", warp " + std::to_string(a.by->warp) + ", " + a.by->what +
         (std::string(a.by->what) == "lane" ? " " + lanes : "") + ", " + p.where(*a.ins);
}

}  // namespace

void Checker::check(Warp& w, const Ins& i, int lane, const Access& mine, const std::vector<Access>& others,
                    const char* first, const char* second) {
  static const Clock nothing;
  const Views& v = w.order.views[lane];
  const Clock &plain = v.plain ? *v.plain : nothing, &async = v.async ? *v.async : nothing;
  for (const Access& a : others) {
    if (!(a.bytes & mine.bytes)) continue;
    ++checked;
    if (a.strong != Scope::none && mine.strong != Scope::none &&
        has(a.strong, a.by->rank, a.by->block, mine.by->rank, mine.by->block) &&
        has(mine.strong, mine.by->rank, mine.by->block, a.by->rank, a.by->block))
      continue;
    const bool is_read = *first == 'r';
    if (!mine.async) {
      if (!seen(a, plain, w.order.lanes, lane))
        w.fault(
            i, lane,
            std::string("nothing orders these: a ") + told(w.grid->program, a, first) + "; and a " + second);
      continue;
    }
    // A bulk copy. It follows what the engine did for this block in the order of lanes; what lanes wrote, and
    // other blocks' engines, across a proxy fence.
    const bool near = a.async && a.by->rank == mine.by->rank && a.by->block == mine.by->block;
    const bool ordered = seen(a, plain, w.order.lanes, lane);
    if (!ordered)
      w.fault(i, lane,
              std::string("nothing orders these: a ") + told(w.grid->program, a, first) +
                  "; and a bulk copy's " + second);
    if (!near && !is_read && !seen(a, async, nullptr, lane))
      w.fault(i, lane,
              std::string("no proxy fence is between these: a ") + told(w.grid->program, a, first) +
                  "; and a bulk copy's " + second);
  }
}

void Checker::touch(Warp& w, const Ins& i, int lane, Access mine, const char* p, uint32_t bytes, bool reads,
                    bool writes) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  const bool shared = w.block->is_shared(begin);
  for (uintptr_t word = begin / 4 * 4; word < end; word += 4) {
    const uintptr_t from = std::max(word, begin) - word, to = std::min(word + 4, end) - word;
    mine.bytes = static_cast<uint8_t>((1u << to) - (1u << from));
    Cell& c = cell(word);
    if (reads) {
      if (shared && !mine.async) {
        uint8_t written = 0;
        for (const Access& a : c.writes) written |= a.bytes;
        if (mine.bytes & ~written)
          w.fault(i, lane,
                  "a read of shared memory that nobody has written: byte " +
                      std::to_string(word - reinterpret_cast<uintptr_t>(w.block->shared.get())));
      }
      check(w, i, lane, mine, c.writes, "write", "read");
    }
    if (writes) {
      if (!reads) check(w, i, lane, mine, c.writes, "write", "write");
      check(w, i, lane, mine, c.reads, "read", "write");
      std::erase_if(c.writes, [&](const Access& a) { return !(a.bytes & ~mine.bytes); });
      std::erase_if(c.reads, [&](const Access& a) { return !(a.bytes & ~mine.bytes); });
      c.writes.push_back(mine);
    } else {
      bool kept = false;
      for (Access& a : c.reads)
        if (a.by == mine.by && a.bytes == mine.bytes && a.async == mine.async && a.strong == mine.strong) {
          if (a.at == mine.at) {
            a.lanes |= mine.lanes;
            kept = true;
          } else if (a.lanes == mine.lanes) {  // the same lanes, later
            a.at = mine.at;
            a.ins = mine.ins;
            kept = true;
          }
          if (kept) break;
        }
      if (!kept) c.reads.push_back(mine);
    }
  }
}

void Checker::read(Warp& w, const Ins& i, int lane, const char* p, uint32_t bytes) {
  if (i.order == Order::acquire) acquire(w, i, lane, reinterpret_cast<uintptr_t>(p));
  touch(w, i, lane,
        {w.order.lanes, Mask{1} << lane, w.order.lanes->now, &i, 0, is_strong(i) ? i.scope : Scope::none,
         false},
        p, bytes, true, false);
}
void Checker::write(Warp& w, const Ins& i, int lane, const char* p, uint32_t bytes, bool rmw) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (rmw && i.order == Order::acq_rel) acquire(w, i, lane, at);
  touch(w, i, lane,
        {w.order.lanes, Mask{1} << lane, w.order.lanes->now, &i, 0, is_strong(i) ? i.scope : Scope::none,
         false},
        p, bytes, rmw, true);
  if (i.order == Order::release || i.order == Order::acq_rel)
    release(w, i, lane, at, rmw);
  else if (!rmw)
    signals_.erase(at);  // a store of another kind ends what its readers could learn
}

void Checker::acquire(Warp& w, const Ins& i, int lane, uintptr_t at) {
  const auto found = signals_.find(at);
  if (found == signals_.end()) return;
  const Agents& me = *w.order.lanes;
  for (const Signal& s : found->second)
    if (has(s.scope, s.rank, s.block, me.rank, me.block) &&
        has(i.scope, me.rank, me.block, s.rank, s.block)) {
      Views& v = w.order.views[lane];
      v = {joined(v.plain, s.views.plain), joined(v.async, s.views.async)};
    }
}
void Checker::release(Warp& w, const Ins& i, int lane, uintptr_t at, bool rmw) {
  auto& all = signals_[at];
  if (!rmw) all.clear();
  const Views mine = snapshot(w, lane);
  const Agents& me = *w.order.lanes;
  for (Signal& s : all)
    if (s.rank == me.rank && s.block == me.block && s.scope == i.scope) {
      s.views = {joined(s.views.plain, mine.plain), joined(s.views.async, mine.async)};
      return;
    }
  all.push_back({me.rank, me.block, i.scope, mine});
}

void Checker::meet(const std::vector<std::pair<Warp*, Mask>>& lanes) {
  Clock plain, async;
  std::vector<const Clock*> done;
  const auto once = [&](Clock& to, const Shared& from) {
    if (!from || std::find(done.begin(), done.end(), from.get()) != done.end()) return;
    done.push_back(from.get());
    join(to, from);
  };
  for (const auto& [w, mask] : lanes) each(mask, [&](int l) { once(plain, w->order.views[l].plain); });
  done.clear();
  for (const auto& [w, mask] : lanes) each(mask, [&](int l) { once(async, w->order.views[l].async); });
  for (const auto& [w, mask] : lanes) {
    Agents& own = *w->order.lanes;
    if (plain.size() < own.base + kLanes) plain.resize(own.base + kLanes);
    each(mask, [&](int l) { plain[own.base + l] = own.now; });
  }
  const Views all{std::make_shared<const Clock>(std::move(plain)),
                  std::make_shared<const Clock>(std::move(async))};
  for (const auto& [w, mask] : lanes) {
    ++w->order.lanes->now;
    each(mask, [&](int l) { w->order.views[l] = all; });
  }
}

void Checker::fence_proxy(Warp& w, int lane) {
  const Views v = snapshot(w, lane);
  w.order.views[lane].async = joined(w.order.views[lane].async, v.plain);
}

// -- the copy engine
// -------------------------------------------------------------------------------------------------------

uint32_t Checker::load(Warp& w, const Ins& i, int lane, const char* from, const char* stage, uint32_t bytes,
                       uint32_t barrier, Agents*& engine) {
  engine = agents(w.grid->launch.rank, w.block->index, w.index, "a bulk load", static_cast<int>(barrier), 1);
  const uint32_t at = ++engine->now;
  const Access mine{engine, 1, at, &i, 0, Scope::none, true};
  touch(w, i, lane, mine, from, bytes, true, false);
  touch(w, i, lane, mine, stage, bytes, false, true);
  ++w.order.lanes->now;
  return at;
}
void Checker::arrive(Warp& w, int lane, Views& phase) {
  const Views v = snapshot(w, lane);
  phase = {joined(phase.plain, v.plain), joined(phase.async, v.async)};
}
void Checker::landed(Agents* engine, uint32_t at, Views& phase) {
  phase.plain = advanced(phase.plain, engine->base, at);
}
void Checker::wait(Warp& w, int lane, const Views& phase) {
  Views& v = w.order.views[lane];
  v = {joined(v.plain, phase.plain), joined(v.async, phase.async)};
}

std::pair<uint32_t, uint32_t> Checker::store(Warp& w, const Ins& i, int lane, const char* to,
                                             const char* stage, uint32_t bytes) {
  Agents *&reads = w.order.store_reads[lane], *&writes = w.order.store_writes[lane];
  if (!reads)
    reads = agents(w.grid->launch.rank, w.block->index, w.index, "a bulk store out of its stage", lane, 1);
  if (!writes) writes = agents(w.grid->launch.rank, w.block->index, w.index, "a bulk store", lane, 1);
  const uint32_t read_at = ++reads->now, write_at = ++writes->now;
  touch(w, i, lane, {reads, 1, read_at, &i, 0, Scope::none, true}, stage, bytes, true, false);
  touch(w, i, lane, {writes, 1, write_at, &i, 0, Scope::none, true}, to, bytes, false, true);
  ++w.order.lanes->now;
  return {read_at, write_at};
}
void Checker::stores_read(Warp& w, int lane, uint32_t at) {
  w.order.views[lane].plain = advanced(w.order.views[lane].plain, w.order.store_reads[lane]->base, at);
}
void Checker::stores_done(Warp& w, int lane, uint32_t at) {
  w.order.views[lane].plain = advanced(w.order.views[lane].plain, w.order.store_writes[lane]->base, at);
}

}  // namespace simt
