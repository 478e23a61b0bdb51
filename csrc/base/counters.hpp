// Traffic counters, per hop. Logical rows are the rows of the routing. Physical rows are those that crossed
// the hop's link: a row for this rank's node never enters the rail, and a row for this rank never leaves it.
#pragma once
#include <cstdint>

namespace moecomm {

struct HopCounters {
  uint64_t logical_rows = 0;
  uint64_t physical_rows = 0;
  uint64_t logical_bytes = 0;
  uint64_t physical_bytes = 0;
};

struct Counters {
  HopCounters rail;
  HopCounters node;
  uint64_t replicated_rows = 0;  // expert layout: rows copied locally for a token's further picks on a rank
  uint64_t quantized_rows = 0;   // rows that dispatch quantized: one per token that has picks
  uint64_t staged_rows = 0;      // rows copied into the window because they were elsewhere
  uint64_t calls = 0;
  uint64_t exchanges = 0;  // exchanges of counts, in which this rank waits for all others
};

}  // namespace moecomm
