// Faults and orders that tests can inject into an emulated GPU.
#pragma once
#include <atomic>
#include <cstdint>

namespace emulated {

// The seed of the order in which the lanes of grids run that start from here on; 0: in the order of their
// numbers.
inline std::atomic<uint64_t> order_seed{0};

// How many bulk stores of this thread's kernels are correct before one writes a wrong bit; -1: all.
inline thread_local int damage = -1;

}  // namespace emulated
