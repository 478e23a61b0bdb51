// A counter that a process can sleep on. A signal wakes only a peer that has announced that it sleeps on this
// counter.
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

inline Counter& counter_at(char* memory, uint64_t offset) { return *as<Counter>(memory + offset); }
inline Counter& sleeping_at(char* memory) { return *as<Counter>(memory); }  // MemoryHeader::sleeping_on

// A futex compares 32 bits. Counters are little-endian, so their low 32 bits come first.
inline void futex_sleep(Counter& c, uint64_t seen, int64_t nanoseconds) {
  timespec ts{nanoseconds / 1000000000, nanoseconds % 1000000000};
  syscall(SYS_futex, &c, FUTEX_WAIT, static_cast<uint32_t>(seen), &ts, nullptr, 0);
}

inline void add_and_wake(char* memory, uint64_t offset, uint64_t add) {
  Counter& c = counter_at(memory, offset);
  c.fetch_add(add, std::memory_order_seq_cst);
  if (sleeping_at(memory).load(std::memory_order_seq_cst) == offset)
    syscall(SYS_futex, &c, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

}  // namespace moecomm
