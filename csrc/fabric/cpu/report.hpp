// How a failing rank reports the failure to the others, and how ranks whose deadline has passed agree on the
// culprit: each reports the rank that it waits for, and the rank that waits for no other is the culprit.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "fabric/cpu/host_rail.hpp"
#include "fabric/cpu/host_state.hpp"

namespace moecomm {

// Writes a word to every rank of the node and every peer of the rail that is not masked, at this rank's place
// there.
template <HostRail Rail>
void publish_word(HostState& s, Rail& rail, FaultWord word) {
  const Geometry& g = s.geometry;
  for (int d = 0; d < g.ranks_per_node; ++d)
    if (d != g.local() && !s.is_masked(g.rank_at(g.node(), d)))
      counter_at(s.windows[d], (s.window_faults + g.local()).value)
          .store(word.packed, std::memory_order_release);
  FaultWord* out = s.fault_out.in(s.rail_region);
  *out = word;
  for (int i = 0; i < static_cast<int>(s.peer_ranks.size()); ++i)
    if (s.peer_ranks[i] >= 0 && !s.is_masked(s.peer_ranks[i]))
      rail.put(i, (s.region_faults + s.own_peer).value, out, sizeof(FaultWord));
}

template <HostRail Rail>
void publish_fault(HostState& s, Rail& rail, const Status& status) {
  publish_word(s, rail, pack_fault(status, status.reporter < 0 ? s.geometry.rank : status.reporter));
}

// Calls visit(rank that wrote it, word) for every word that has arrived.
template <class Visit>
void each_word(const HostState& s, Visit&& visit) {
  const auto read = [](char* memory, Offset<FaultWord> at) {
    return FaultWord{counter_at(memory, at.value).load(std::memory_order_acquire)};
  };
  const Geometry& g = s.geometry;
  for (int i = 0; i < g.ranks_per_node; ++i)
    if (const FaultWord w = read(s.windows[g.local()], s.window_faults + i); w.packed)
      visit(g.rank_at(g.node(), i), w);
  for (int i = 0; s.rail_region && i < static_cast<int>(s.peer_ranks.size()); ++i)
    if (const FaultWord w = read(s.rail_region, s.region_faults + i); w.packed) visit(s.peer_ranks[i], w);
}

// Calls visit(rank that wrote it, status) for every reported failure.
template <class Visit>
void each_report(const HostState& s, Visit&& visit) {
  each_word(s, [&](int writer, FaultWord w) {
    if (!is_waiting(w.packed)) visit(writer, unpack_fault(w));
  });
}

// For a rank that waits for long: the failure if another rank waits in another call, else ok.
inline Status other_call(const HostState& s, Phase phase) {
  if (!s.call || !s.call->word) return {};
  if (!s.call->announced) {
    s.call->announced = true;
    s.call->announce(s.call->word);
  }
  Status found;
  const uint64_t own = s.call->word;
  each_word(s, [&](int writer, FaultWord w) {
    if (found.ok() && waits_elsewhere(own, w.packed)) found = other_call(own, w.packed, writer, phase);
  });
  return found;
}

// The first failure that has been reported to this rank, else ok.
inline Status reported_fault(const HostState& s) {
  Status first;
  each_report(s, [&](int, const Status& reported) {
    if (first.ok()) first = reported;
  });
  return first;
}

// A rank that has reported that this rank missed its deadline or is lost; -1: none.
inline int given_up_by(const HostState& s) {
  int who = -1;
  each_report(s, [&](int writer, const Status& reported) {
    if (who < 0 && writer != s.geometry.rank && reported.peer == s.geometry.rank &&
        (reported.code == Code::timeout || reported.code == Code::lost))
      who = writer;
  });
  return who;
}

// If other ranks gave up because this rank was absent: a timeout whose peer is this rank and whose detail is
// the length of the absence in milliseconds. Else ok. A rank that blames this one has waited a whole timeout;
// if this rank has waited much less, it came late. unreachable: a peer whose connection is gone although its
// process was not seen to end, or -1.
inline Status own_absence(const HostState& s, Phase phase, int unreachable, uint64_t expected, uint64_t got) {
  if (!s.was_away() && !s.came_late()) return {};
  int by = given_up_by(s);
  if (by < 0 && s.was_away()) by = unreachable;
  if (by < 0) return {};
  constexpr int64_t kMost = (1 << 24) - 1;  // the most that a FaultWord can hold
  const int64_t away = (s.was_away() ? s.absent : s.between) / std::chrono::milliseconds(1);
  return {Code::timeout,
          phase,
          s.geometry.rank,
          static_cast<int32_t>(std::clamp<int64_t>(away, 1, kMost)),
          expected,
          got,
          by};
}

// Finds the culprit when this rank waits for `mine.peer` and its deadline, or another rank's, has passed.
// Waits a moment for the reports of other ranks, and follows the chain of "I wait for" to its end.
template <HostRail Rail>
Status blame_timeout(HostState& s, Rail& rail, Status mine) {
  publish_fault(s, rail, mine);
  const auto enough = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
  int suspect = mine.peer;
  while (std::chrono::steady_clock::now() < enough) {
    int next = mine.peer, from = -1;
    for (int step = 0; step < s.geometry.size; ++step) {
      int further = -1;
      each_report(s, [&](int writer, const Status& reported) {
        if (writer == next && reported.peer >= 0 && reported.peer != writer) further = reported.peer;
      });
      if (further < 0 || further == s.geometry.rank) break;
      from = next;
      next = further;
    }
    if (next != suspect) {
      suspect = next;
      Status better = mine;
      better.peer = suspect;
      better.reporter = from;
      publish_fault(s, rail, better);
    }
    if (!rail.progress()) usleep(500);
  }
  if (suspect != mine.peer) {
    mine.reporter = mine.peer;
    mine.peer = suspect;
  }
  return mine;
}

}  // namespace moecomm
