// PTX instructions that C++ cannot express. Scopes: .gpu between warps of one rank, .sys between ranks.
//
// The copy engine makes bulk copies in another proxy than that of ordinary loads and stores: the engine sees
// writes of threads, and threads see its writes, only across fence.proxy.async.
#pragma once
#include <cstdint>

namespace moecomm::ptx {

// Whether there is a copy engine; else a warp copies through its registers.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulk = true;
#else
constexpr bool kBulk = false;
#endif

__device__ inline uint64_t load_acquire_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ inline uint64_t load_acquire_gpu(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
// For polling a word that grows. Unlike an acquire it does not invalidate the multiprocessor's cache, so a
// wait polls with it and acquires once at the end.
__device__ inline uint64_t load_relaxed_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ inline uint64_t load_relaxed_gpu(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ inline void add_release_sys(uint64_t* p, uint64_t v) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ inline void add_release_gpu(uint64_t* p, uint64_t v) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ inline uint64_t fetch_add_release_gpu(uint64_t* p, uint64_t v) {
  uint64_t before;
  asm volatile("atom.release.gpu.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(p), "l"(v) : "memory");
  return before;
}
__device__ inline void store_release_sys(uint64_t* p, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
// A barrier of `threads` threads of the block, with barrier number `id` (1..15).
__device__ inline void block_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// Loads 16 bytes. Peers or the engine may have written them, so the read-only (.nc) path must not be used.
__device__ inline uint4 load16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ inline void store16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

#if __CUDA_ARCH__ >= 900

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ inline void barrier_init(uint64_t* barrier) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], "
      "1;\n\tfence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::"r"(
          shared_address(barrier))
      : "memory");
}
// Copies from global to shared memory. The phase of the barrier completes when all bytes have arrived.
__device__ inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, "
        "p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
// Copies from shared to global memory. The copies since the last commit form a bulk group.
__device__ inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most kPending bulk groups still read shared memory.
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
__device__ inline void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#else

__device__ inline void proxy_fence() {}
__device__ inline void barrier_init(uint64_t*) {}
__device__ inline void bulk_load(void*, const void*, uint32_t, uint64_t*) {}
__device__ inline void barrier_wait(uint64_t*, uint32_t) {}
__device__ inline void bulk_store(void*, const void*, uint32_t) {}
__device__ inline void bulk_commit() {}
template <int kPending>
__device__ inline void bulk_wait_read() {}
__device__ inline void bulk_wait_all() {}

#endif

}  // namespace moecomm::ptx
