// What a kernel waits for, without a clock: loads that follow each other.
//
// A warp has two clocks. The first counts latencies of peers' memory, the second those of its own GPU's. A
// load's result is available one latency after its issue. An instruction that reads it waits until then, and
// so do all later instructions. So loads that are under way together cost one latency, and loads that need
// each other's results cost one each. Bytes per latency are what a warp keeps in flight.
#pragma once
#include <mutex>

#include "machine.hpp"

namespace simt {

bool counts_costs();
void count_costs(bool on);
std::recursive_mutex& costs_mutex();  // one warp at a time

void issue(Warp& w, const Ins& i);                                 // waits for what it reads
void loads(Warp& w, const Ins& i, const char* p, uint64_t bytes);  // of global memory
void bulk_loads(Warp& w, const Ins& i, const char* p, uint64_t bytes, Mbarrier& b);
void bulk_stores(Warp& w, const char* p);
void wait_until(Warp& w, const Ins& i, const uint32_t (&due)[2]);

}  // namespace simt
