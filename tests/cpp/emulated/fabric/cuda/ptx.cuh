// Stands in for csrc/fabric/cuda/ptx.cuh on a CPU, so that tests run the device fabric's own code. A lane is
// a thread or a fiber, and the copy engine uses all freedom that its rules allow (engine.hpp). These errors
// fail a check: a stage that is filled before its stores have read it; a bulk load after an acquire or a
// barrier of lanes without a proxy fence between; a release while bulk stores are in flight, or without a
// proxy fence after them.
#pragma once
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.hpp"
#include "lanes.hpp"  // as threads or as fibers

#define __device__

struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulated {

inline uint32_t shuffle(uint32_t v, int from) {
  warp->words[lane.x % 32] = v;
  sync();
  const uint32_t out = warp->words[from];
  sync();
  return out;
}
// Lane 0, which starts the copies, may now see data that the engine does not see.
inline void outdate() {
  if (lane.x % 32 == 0) engine().stale = true;
}

}  // namespace emulated

#define threadIdx emulated::lane
inline void __syncwarp() {
  emulated::sync();
  emulated::outdate();
}
inline uint32_t __shfl_sync(unsigned, uint32_t v, int from) { return emulated::shuffle(v, from); }
inline uint32_t __shfl_xor_sync(unsigned, uint32_t v, int mask) {
  return emulated::shuffle(v, static_cast<int>(emulated::lane.x % 32) ^ mask);
}
inline bool __any_sync(unsigned, bool v) {
  bool found = false;
  for (int i = 0; i < 32; ++i) found |= emulated::shuffle(v, i) != 0;
  return found;
}
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline double __hiloint2double(int hi, int lo) {
  return std::bit_cast<double>(uint64_t{static_cast<uint32_t>(hi)} << 32 | static_cast<uint32_t>(lo));
}
inline int __double2loint(double v) { return static_cast<int>(std::bit_cast<uint64_t>(v)); }
inline int __double2hiint(double v) { return static_cast<int>(std::bit_cast<uint64_t>(v) >> 32); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected,
                                    unsigned long long desired) {
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

namespace moecomm::ptx {

constexpr bool kBulk = true;

// A lane that polls lets other lanes run.
inline uint64_t load_acquire_sys(const uint64_t* p) {
  emulated::pause();
  emulated::outdate();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline uint64_t load_acquire_gpu(const uint64_t* p) { return load_acquire_sys(p); }
inline uint64_t load_relaxed_sys(const uint64_t* p) {
  emulated::pause();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline uint64_t load_relaxed_gpu(const uint64_t* p) { return load_relaxed_sys(p); }
inline void add_release_sys(uint64_t* p, uint64_t v) {
  CHECK(emulated::engine().quiet());
  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
}
inline void add_release_gpu(uint64_t* p, uint64_t v) { add_release_sys(p, v); }
inline uint64_t fetch_add_release_gpu(uint64_t* p, uint64_t v) {
  CHECK(emulated::engine().quiet());
  return __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
}
inline void store_release_sys(uint64_t* p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void block_barrier(int id, int threads) {
  auto& squad = emulated::block->squads[(id - 1) / emulated::block->per_squad];
  CHECK_EQ(squad.size(), threads);
  emulated::sync(squad);
  emulated::outdate();
}
inline uint64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

inline uint4 load16(const void* p) {
  uint4 v;
  CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0);
  std::memcpy(&v, p, 16);
  return v;
}
inline void store16(void* p, uint4 v) {
  CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0);
  std::memcpy(p, &v, 16);
}

inline void proxy_fence() {
  auto& e = emulated::engine();
  for (auto& s : e.unseen) std::memcpy(s.to, s.data.data(), s.bytes);
  e.unseen.clear();
  e.stale = false;
}
inline void barrier_init(uint64_t* barrier) { *barrier = 0; }  // phases that have ended
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  auto& e = emulated::engine();
  CHECK(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(shared) % 16 == 0 &&
        reinterpret_cast<uintptr_t>(global) % 16 == 0);
  CHECK(!e.in_use(shared, bytes));
  CHECK(!e.stale);
  const auto* from = static_cast<const char*>(global);
  CHECK(e.loads
            .emplace(barrier, emulated::Engine::Load{shared, global, bytes,
                                                     e.eager() ? std::vector<char>(from, from + bytes)
                                                               : std::vector<char>()})
            .second);
  std::memset(shared, 0xee, bytes);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  auto& e = emulated::engine();
  const auto found = e.loads.find(barrier);
  CHECK(found != e.loads.end());
  if (found == e.loads.end()) return;
  CHECK_EQ(*barrier & 1, uint64_t{parity});
  const auto& load = found->second;
  std::memcpy(load.stage, load.early.empty() ? load.from : load.early.data(), load.bytes);
  e.loads.erase(found);
  ++*barrier;
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  auto& e = emulated::engine();
  CHECK(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0 &&
        reinterpret_cast<uintptr_t>(shared) % 16 == 0);
  if (emulated::damage >= 0 && emulated::damage-- == 0)
    const_cast<char*>(static_cast<const char*>(shared))[0] ^= 1;  // every copy of this piece
  if (e.eager())
    std::memcpy(global, shared, bytes);
  else
    e.open.stores.push_back({global, shared, bytes, {}});
}
inline void bulk_commit() {
  auto& e = emulated::engine();
  e.groups.push_back(std::move(e.open));
  e.open = {};
}
template <int kPending>
inline void bulk_wait_read() {
  auto& e = emulated::engine();
  for (size_t i = 0; i + kPending < e.groups.size(); ++i) e.read(e.groups[i]);
}
inline void bulk_wait_all() {
  auto& e = emulated::engine();
  CHECK(e.open.stores.empty());
  for (auto& g : e.groups) {
    e.read(g);
    e.unseen.insert(e.unseen.end(), g.stores.begin(), g.stores.end());
  }
  e.groups.clear();
}

}  // namespace moecomm::ptx
