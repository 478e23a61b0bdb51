// A counter that a process may sleep on: signal wakes only a peer that said it sleeps on this counter.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "base/layout.hpp"

namespace moecomm {

using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free && sizeof(Counter) == 8);

inline Counter& counter_at(char* memory, uint64_t offset) {
  return *reinterpret_cast<Counter*>(memory + offset);
}
inline Counter& sleeping_at(char* memory) {
  return *reinterpret_cast<Counter*>(memory);
}  // MemoryHeader::sleeping_on

// Counters are little-endian, so the low 32 bits (what a futex compares) come first.
inline void futex_sleep(Counter& c, uint64_t seen, int64_t nanoseconds) {
  timespec ts{nanoseconds / 1000000000, nanoseconds % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&c), FUTEX_WAIT, static_cast<uint32_t>(seen), &ts, nullptr,
          0);
}

inline void add_and_wake(char* memory, uint64_t offset, uint64_t add) {
  Counter& c = counter_at(memory, offset);
  c.fetch_add(add, std::memory_order_seq_cst);
  if (sleeping_at(memory).load(std::memory_order_seq_cst) == offset)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&c), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

}  // namespace moecomm
