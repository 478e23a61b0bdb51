// HostRail: the concept of a rail between CPU processes.
#pragma once
#include <concepts>
#include <cstdint>

namespace moecomm {

// How the peers of put() are reached. No function throws or blocks.
template <class Rail>
concept HostRail = requires(Rail& rail, const char* source, char* to) {
  rail.put(0, uint64_t{}, source, uint64_t{});  // (peer, offset there, source, bytes)
  rail.get(0, to, uint64_t{}, uint64_t{});      // (peer, to, offset there, bytes)
  rail.signal(0, uint64_t{}, uint64_t{});       // (peer, counter, add)
  { rail.reach(0) } -> std::same_as<char*>;     // the peer's region if stores can reach it, else null
  { rail.progress() } -> std::same_as<bool>;    // makes progress; whether something moved
  { rail.lost(0) } -> std::same_as<int>;        // (rank that is awaited): a rank whose link is gone; else -1
  { rail.flush_poll() } -> std::same_as<bool>;  // whether all puts and signals are complete
  {
    rail.drained()
  } -> std::same_as<bool>;  // whether sources of puts may be overwritten and gets are complete
  { Rail::kNetwork } -> std::convertible_to<bool>;  // true: an arriving put does not wake a sleeping rank
};

}  // namespace moecomm
