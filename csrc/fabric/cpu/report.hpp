// How a failing rank tells the others, and how ranks whose time is up agree on whom to blame: each says whom
// it waits for, and the one that waits for nobody is the culprit.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "fabric/cpu/host_state.hpp"

namespace moecomm {

// To every rank of the node and every peer of the rail: one word each, in this rank's own place there.
template <class Rail>
void publish_word(HostState& s, Rail& rail, FaultWord word) {
  const Geometry& g = s.geometry;
  for (int d = 0; d < g.ranks_per_node; ++d)
    if (d != g.local())
      counter_at(s.windows[d], (s.window_faults + g.local()).value)
          .store(word.packed, std::memory_order_release);
  FaultWord* out = s.fault_out.in(s.rail_region);
  *out = word;
  for (int i = 0; i < static_cast<int>(s.peer_ranks.size()); ++i)
    if (s.peer_ranks[i] >= 0) rail.put(i, (s.region_faults + s.own_peer).value, out, sizeof(FaultWord));
}

template <class Rail>
void publish_fault(HostState& s, Rail& rail, const Status& status) {
  publish_word(s, rail, pack_fault(status, status.reporter < 0 ? s.geometry.rank : status.reporter));
}

// visit(rank that wrote it, the word) for every word that is here.
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

// The same for every report of a fault.
template <class Visit>
void each_report(const HostState& s, Visit&& visit) {
  each_word(s, [&](int writer, FaultWord w) {
    if (!is_waiting(w.packed)) visit(writer, unpack_fault(w));
  });
}

// This rank waits for long: whether another one does so in another call, where it should be in this one. All
// ranks make their calls in the same order, so neither will come to the other's.
inline Status other_call(const HostState& s, Phase phase) {
  if (!s.call || !s.call->word) return {};
  if (!s.call->told) {
    s.call->told = true;
    s.call->tell(s.call->word);
  }
  Status found;
  const uint64_t own = s.call->word;
  each_word(s, [&](int writer, FaultWord w) {
    if (is_waiting(w.packed) && number_of_waiting(w.packed) == number_of_waiting(own) && w.packed != own &&
        found.ok())
      found = {Code::out_of_step,
               phase,
               writer,
               verbs_detail(verb_of_waiting(own), verb_of_waiting(w.packed)),
               own,
               w.packed};
  });
  return found;
}

// The first report that is here, else ok.
inline Status reported_fault(const HostState& s) {
  Status first;
  each_report(s, [&](int, const Status& said) {
    if (first.ok()) first = said;
  });
  return first;
}

// A rank that has said that it waited too long for this one, or that this one is gone; -1: none has.
inline int given_up_by(const HostState& s) {
  int who = -1;
  each_report(s, [&](int writer, const Status& said) {
    if (who < 0 && writer != s.geometry.rank && said.peer == s.geometry.rank &&
        (said.code == Code::timeout || said.code == Code::lost))
      who = writer;
  });
  return who;
}

// Where others have ended without this rank, since it was away: a timeout whose peer is this rank, and whose
// detail is for how many milliseconds. Else ok. A rank that names this one has waited a whole timeout: where
// this one has waited much less, it came late. unreachable: a peer whose connection is gone although nobody
// saw it die, or -1.
inline Status own_absence(const HostState& s, Phase phase, int unreachable, uint64_t expected, uint64_t got) {
  if (!s.was_away() && !s.came_late()) return {};
  int by = given_up_by(s);
  if (by < 0 && s.was_away()) by = unreachable;
  if (by < 0) return {};
  constexpr int64_t kMost = (1 << 24) - 1;  // what a FaultWord holds
  const int64_t away = (s.was_away() ? s.absent : s.between) / std::chrono::milliseconds(1);
  return {Code::timeout,
          phase,
          s.geometry.rank,
          static_cast<int32_t>(std::clamp<int64_t>(away, 1, kMost)),
          expected,
          got,
          by};
}

// This rank waits for `mine.peer` and its time, or another rank's, is up. Reports cross for a moment; then
// the chain of "I wait for" is followed to its end.
template <class Rail>
Status settle_timeout(HostState& s, Rail& rail, Status mine) {
  publish_fault(s, rail, mine);
  const auto enough = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
  int suspect = mine.peer;
  while (std::chrono::steady_clock::now() < enough) {
    int next = mine.peer, from = -1;
    for (int step = 0; step < s.geometry.size; ++step) {
      int further = -1;
      each_report(s, [&](int writer, const Status& said) {
        if (writer == next && said.peer >= 0 && said.peer != writer) further = said.peer;
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
