// What an emulated GPU can be told to make worse.
#pragma once
#include <atomic>
#include <cstdint>

namespace emulated {

// Lanes of all grids that start from here on run in an order that this seed chooses; 0: in that of their
// numbers.
inline std::atomic<uint64_t> order_seed{0};

// Bulk stores of this thread's kernels that go well before one writes a wrong bit; -1: none does.
inline thread_local int damage = -1;

}  // namespace emulated
