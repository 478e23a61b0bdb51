// The least cost of writes and reads, for benchmarks: moves the same bytes between the same memories by plain
// loads and stores.
#pragma once
#include "runtime/cpu/domain.hpp"

namespace moecomm {

// This rank and `peer` alternately write `bytes` to each other, `rounds` times each; the lower rank begins.
// Both ranks call it. bare: by a memcpy and a flag, if stores reach the peer (else Code::invalid). Counter 0
// of both ranks counts the rounds; `done` is the number of earlier rounds.
Status ping(Domain& domain, int peer, uint64_t there, char* here, uint64_t bytes, int rounds, uint64_t done,
            bool bare);

// Copies `bytes` to the memory of a peer, or from it, by memcpy, `times` times. Code::invalid: stores do not
// reach the peer.
Status bare_copy(Domain& domain, int peer, uint64_t there, char* here, uint64_t bytes, int times, bool reads);

}  // namespace moecomm
