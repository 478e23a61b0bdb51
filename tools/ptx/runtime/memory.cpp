// Loads, stores and atomics. Every access is checked: its alignment, and that it lies in allocated memory, in
// the block's shared memory, or in a tensor that the launch was given.
#include <cstring>

#include "checker.hpp"
#include "costs.hpp"
#include "extents.hpp"

namespace simt {

char* Warp::at(const Ins& i, int lane, Space space, uint64_t address, uint32_t bytes) {
  if (space == Space::param || space == Space::local) {
    const uint64_t limit = space == Space::param ? grid->kernel.parameter_bytes : grid->program.local_bytes;
    if (address + bytes > limit)
      fault(i, lane, "parameters end before byte " + std::to_string(address + bytes));
    return space == Space::param ? const_cast<char*>(grid->launch.parameters.data()) + address
                                 : locals.data() + lane * grid->program.local_bytes + address;
  }
  if (address % bytes)
    fault(i, lane,
          "an access of " + std::to_string(bytes) + " bytes is not aligned: its address ends in " +
              std::to_string(address % 64) + " of 64");
  if (space == Space::shared) {
    address = static_cast<uint32_t>(address);
    if (address + bytes > block->shared_bytes)
      fault(i, lane,
            "shared memory has " + std::to_string(block->shared_bytes) + " bytes; access to " +
                std::to_string(address) + ", " + std::to_string(bytes) + " bytes");
    return block->shared.get() + address;
  }
  if (block->is_shared(address) && block->is_shared(address + bytes - 1))
    return reinterpret_cast<char*>(address);
  emulated::Extents& all = emulated::extents();
  if (known_version_ == all.version() && address >= known_begin_ && address + bytes <= known_end_)
    return reinterpret_cast<char*>(address);
  for (const Extent& e : grid->launch.extents) {
    const auto begin = reinterpret_cast<uintptr_t>(e.begin);
    if (address >= begin && address + bytes <= begin + e.bytes) return reinterpret_cast<char*>(address);
  }
  if (!all.find(address, bytes, known_begin_, known_end_, known_version_))
    fault(
        i, lane,
        "an access of " + std::to_string(bytes) + " bytes is outside of all memory: " + all.nearest(address));
  return reinterpret_cast<char*>(address);
}

void StaleCache::read(const char* p, void* to, uint32_t bytes, bool fresh) {
  const auto at = reinterpret_cast<uintptr_t>(p), line = at / kLine * kLine;  // aligned: within one line
  auto found = lines_.find(line);
  if (found == lines_.end() || fresh) {
    auto& kept = lines_[line];
    std::memcpy(kept.data(), reinterpret_cast<const void*>(line), kLine);
    std::memcpy(to, kept.data() + (at - line), bytes);
    return;
  }
  std::memcpy(to, found->second.data() + (at - line), bytes);
}
void StaleCache::wrote(const char* p, const void* from, uint32_t bytes) {
  for (uint32_t k = 0; k < bytes; ++k) {
    const auto at = reinterpret_cast<uintptr_t>(p) + k;
    if (const auto found = lines_.find(at / kLine * kLine); found != lines_.end())
      found->second[at % kLine] = static_cast<const char*>(from)[k];
  }
}
void StaleCache::drop(const char* p, uint32_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t line = at / kLine * kLine; line < at + bytes; line += kLine) lines_.erase(line);
}

namespace {

// Whether a load may be answered with what the block has read before.
bool may_be_stale(const Warp& w, const Ins& i, const char* p) {
  return w.grid->seed && i.order == Order::weak && !w.is_parameter(p) &&
         !w.block->is_shared(reinterpret_cast<uintptr_t>(p));
}
bool reaches_beyond_the_block(const Ins& i) { return i.scope == Scope::gpu || i.scope == Scope::sys; }

template <class T>
inline uint64_t extended(const char* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return static_cast<uint64_t>(static_cast<int64_t>(v));  // registers are wider than what is loaded
}

template <Space kSpace, int kCount, class T>
void load(Warp& w, const Ins& i, Mask m) {
  const bool acquires = i.order == Order::acquire;
  Checker* const order = checker();
  if constexpr (kSpace == Space::global)
    if (counts_costs()) {
      const int l = std::countr_zero(m);
      const uint64_t at = (i.r[kCount] >= 0 ? w.reg(i.r[kCount])[l] : 0) + i.integer;
      if (!w.block->is_shared(at) && !w.is_parameter(reinterpret_cast<const char*>(at)))
        loads(w, i, reinterpret_cast<const char*>(at), std::popcount(m) * kCount * sizeof(T));
    }
  each(m, [&](int l) {
    const uint64_t base = i.r[kCount] >= 0 ? w.reg(i.r[kCount])[l] : 0;
    const char* p = w.at(i, l, kSpace, base + i.integer, kCount * sizeof(T));
    if constexpr (kSpace == Space::global || kSpace == Space::shared)
      if (order && !w.is_parameter(p)) order->read(w, i, l, p, kCount * sizeof(T));
    if constexpr (kCount == 1 && sizeof(T) == 8)
      if (i.order != Order::weak) {
        w.reg(i.r[0])[l] = __atomic_load_n(reinterpret_cast<const uint64_t*>(p), __ATOMIC_ACQUIRE);
        if (w.grid->seed) w.block->cache.drop(p, 8);
        if (acquires) w.engine(l).stale = true;
        if (acquires && reaches_beyond_the_block(i)) w.block->cache.empty();
        return;
      }
    T copy[kCount];
    if constexpr (kSpace == Space::global)
      if (may_be_stale(w, i, p)) {
        w.block->cache.read(p, copy, sizeof(copy), w.grid->chance(4));
        p = reinterpret_cast<const char*>(copy);
      }
    for (int k = 0; k < kCount; ++k)
      if (i.r[k] >= 0) w.reg(i.r[k])[l] = extended<T>(p + k * sizeof(T));
  });
}

template <Space kSpace, int kCount, class T>
void store(Warp& w, const Ins& i, Mask m) {
  Checker* const order = checker();
  each(m, [&](int l) {
    const uint64_t base = i.r[0] >= 0 ? w.reg(i.r[0])[l] : 0;
    char* p = w.at(i, l, kSpace, base + i.integer, kCount * sizeof(T));
    if constexpr (kSpace == Space::global || kSpace == Space::shared)
      if (order) order->write(w, i, l, p, kCount * sizeof(T));
    if constexpr (kCount == 1 && sizeof(T) == 8)
      if (i.order != Order::weak) {
        __atomic_store_n(reinterpret_cast<uint64_t*>(p), w.reg(i.r[1])[l], __ATOMIC_RELEASE);
        w.block->cache.drop(p, 8);
        return;
      }
    T values[kCount];
    for (int k = 0; k < kCount; ++k) values[k] = static_cast<T>(w.reg(i.r[1 + k])[l]);
    std::memcpy(p, values, sizeof(values));
    if constexpr (kSpace == Space::global) w.block->cache.wrote(p, values, sizeof(values));
  });
}

// What is released must have left the copy engine.
void before_release(Warp& w, const Ins& i, int lane) {
  if (i.order != Order::release && i.order != Order::acq_rel) return;
  if (w.engines[lane] && !w.engines[lane]->quiet())
    w.fault(i, lane, "a release while bulk stores are under way, or without a proxy fence behind them");
}

template <class T>
void atomic_add(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    before_release(w, i, l);
    auto* p = reinterpret_cast<T*>(w.at(i, l, Space::global, w.reg(i.r[1])[l], sizeof(T)));
    if (checker()) checker()->write(w, i, l, reinterpret_cast<const char*>(p), sizeof(T), true);
    w.reg(i.r[0])[l] = __atomic_fetch_add(p, get<T>(w.reg(i.r[2])[l]), __ATOMIC_ACQ_REL);
    w.block->cache.drop(reinterpret_cast<const char*>(p), sizeof(T));
    if (i.order != Order::acq_rel && i.order != Order::acquire) return;
    w.engine(l).stale = true;
    if (reaches_beyond_the_block(i)) w.block->cache.empty();
  });
}
template <class T>
void reduce_add(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    before_release(w, i, l);
    auto* p = reinterpret_cast<T*>(w.at(i, l, Space::global, w.reg(i.r[0])[l], sizeof(T)));
    if (checker()) checker()->write(w, i, l, reinterpret_cast<const char*>(p), sizeof(T), true);
    __atomic_fetch_add(p, get<T>(w.reg(i.r[1])[l]), __ATOMIC_ACQ_REL);
    w.block->cache.drop(reinterpret_cast<const char*>(p), sizeof(T));
  });
}
template <class T>
void compare_and_swap(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    auto* p = reinterpret_cast<T*>(w.at(i, l, Space::global, w.reg(i.r[1])[l], sizeof(T)));
    if (checker()) checker()->write(w, i, l, reinterpret_cast<const char*>(p), sizeof(T), true);
    T expected = get<T>(w.reg(i.r[2])[l]);
    __atomic_compare_exchange_n(p, &expected, get<T>(w.reg(i.r[3])[l]), false, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
    w.reg(i.r[0])[l] = expected;
    w.block->cache.drop(reinterpret_cast<const char*>(p), sizeof(T));
  });
}

void copy_local(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    char* own = w.locals.data() + l * w.grid->program.local_bytes;
    std::memcpy(own + i.r[0], own + i.r[1], i.integer);
  });
}
void address_of_parameter(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    w.reg(i.r[0])[l] = reinterpret_cast<uintptr_t>(w.grid->launch.parameters.data()) + i.integer;
  });
}
void to_generic(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    w.reg(i.r[0])[l] = reinterpret_cast<uintptr_t>(w.block->shared.get()) + get<uint32_t>(w.reg(i.r[1])[l]);
  });
}
void to_shared(Warp& w, const Ins& i, Mask m) {
  each(m, [&](int l) {
    const uint64_t generic = w.reg(i.r[1])[l];
    if (!w.block->is_shared(generic))
      w.fault(i, l, "an address that is not of this block's shared memory is taken for one");
    w.reg(i.r[0])[l] = generic - reinterpret_cast<uintptr_t>(w.block->shared.get());
  });
}

using Table = std::map<std::string, Operation>;

template <Space kSpace, int kCount>
void add_accesses(Table& all, const std::string& space) {
  const std::string head = space + "." + std::to_string(kCount) + ".";
  const auto polls = kSpace == Space::global && kCount == 1 ? Kind::poll : Kind::plain;
  all["ld." + head + "u8"] = {load<kSpace, kCount, uint8_t>, Kind::plain},
                     all["ld." + head + "s8"] = {load<kSpace, kCount, int8_t>, Kind::plain};
  all["ld." + head + "u16"] = {load<kSpace, kCount, uint16_t>, Kind::plain},
                     all["ld." + head + "s16"] = {load<kSpace, kCount, int16_t>, Kind::plain};
  all["ld." + head + "u32"] = {load<kSpace, kCount, uint32_t>, polls},
                     all["ld." + head + "s32"] = {load<kSpace, kCount, int32_t>, Kind::plain};
  all["st." + head + "u8"] = {store<kSpace, kCount, uint8_t>, Kind::plain},
                     all["st." + head + "u16"] = {store<kSpace, kCount, uint16_t>, Kind::plain};
  all["st." + head + "u32"] = {store<kSpace, kCount, uint32_t>, Kind::plain};
  if constexpr (kCount < 4) {
    all["ld." + head + "u64"] = {load<kSpace, kCount, uint64_t>, polls},
                       all["ld." + head + "s64"] = {load<kSpace, kCount, int64_t>, Kind::plain};
    all["st." + head + "u64"] = {store<kSpace, kCount, uint64_t>, Kind::plain};
  }
}
template <Space kSpace>
void add_space(Table& all, const std::string& space) {
  add_accesses<kSpace, 1>(all, space), add_accesses<kSpace, 2>(all, space),
      add_accesses<kSpace, 4>(all, space);
}

}  // namespace

void add_memory(Table& all) {
  add_space<Space::global>(all, "global"), add_space<Space::shared>(all, "shared"),
      add_space<Space::param>(all, "param"), add_space<Space::local>(all, "local");
  const auto add = [&](const char* name, Handler run) { all[name] = {run, Kind::plain}; };
  add("atom.add.u32", atomic_add<uint32_t>), add("atom.add.u64", atomic_add<uint64_t>);
  add("red.add.u32", reduce_add<uint32_t>), add("red.add.u64", reduce_add<uint64_t>);
  add("atom.cas.u32", compare_and_swap<uint32_t>), add("atom.cas.u64", compare_and_swap<uint64_t>);
  add("copy.local", copy_local), add("mov.param", address_of_parameter), add("cvta.shared", to_generic),
      add("cvta.to.shared", to_shared);
}

}  // namespace simt
