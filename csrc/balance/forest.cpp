#include "balance/forest.hpp"

#include <algorithm>

namespace moecomm::balance {

Forest::Forest(const Replicas& r, double* share)
    : r_(r),
      share_(share),
      runs_(r.slot.size()),
      used_(r.ranks, 0),
      up_(r.experts + r.ranks),
      least_(r.experts) {
  for (size_t i = 0; i < runs_.size(); ++i) {
    runs_[i] = share[i] > 0.0;
    used_[r.rank[i]] += runs_[i];
  }
}

// Adds the replicas to an empty forest, largest share first.
void Forest::prune() {
  const int n = static_cast<int>(runs_.size());
  std::vector<int32_t> order;
  for (int i = 0; i < n; ++i)
    if (runs_[i]) order.push_back(i);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return share_[a] != share_[b] ? share_[a] > share_[b] : a < b; });
  std::fill(up_.begin(), up_.end(), -1);
  const auto other = [&](int node, int i) {
    return node < r_.experts ? r_.experts + r_.rank[i] : r_.expert[i];
  };
  // Makes this node the root of its tree.
  const auto reroot = [&](int node) {
    for (int via = -1; node >= 0;) {
      const int next = up_[node];
      up_[node] = via;
      via = next;
      node = next < 0 ? -1 : other(node, next);
    }
  };
  for (const int i : order) {
    const int e = r_.expert[i], rank = r_.experts + r_.rank[i];
    reroot(rank);
    int top = e;
    while (top != rank && up_[top] >= 0) top = other(top, up_[top]);
    if (top != rank) {  // two trees: joined
      up_[rank] = i;
      continue;
    }
    // A cycle: i, and the path from e to its rank. The replicas on it alternate between two sides: one side
    // loses what the other gains. i is on side 0.
    int lost[2] = {i, -1};  // the replica with the smallest share on each side
    int place = 1;
    for (int node = e; node != rank; node = other(node, up_[node]), place = 1 - place) {
      const int k = up_[node];
      if (lost[place] < 0 || share_[k] < share_[lost[place]]) lost[place] = k;
    }
    const auto fuller = [&](int a, int b) {
      return used_[r_.rank[a]] != used_[r_.rank[b]] ? used_[r_.rank[a]] > used_[r_.rank[b]]
                                                    : share_[a] < share_[b];
    };
    const int side = fuller(lost[1], lost[0]) ? 1 : 0, leaving = lost[side];
    const double amount = share_[leaving];
    share_[i] += side == 0 ? -amount : amount;  // the share of `leaving` becomes exactly 0
    place = 1;
    for (int node = e; node != rank; node = other(node, up_[node]), place = 1 - place)
      share_[up_[node]] += place == side ? -amount : amount;
    runs_[leaving] = 0;
    --used_[r_.rank[leaving]];
    if (leaving == i) continue;
    // Without the replica the tree has two parts; i joins them.
    for (int node = e; node != rank; node = other(node, up_[node]))
      if (up_[node] == leaving) {
        up_[node] = -1;
        break;
      }
    reroot(e);
    up_[e] = i;
  }
}

// Computes up_ and least_ for the tree that contains this rank, with the rank as the root.
void Forest::span(int root) {
  std::fill(up_.begin(), up_.end(), -1);
  std::fill(least_.begin(), least_.end(), -1);
  queue_.assign(1, root);
  const int per_rank = r_.slots_per_rank();
  for (size_t k = 0; k < queue_.size(); ++k) {
    const int rank = queue_[k], from = up_[r_.experts + rank];
    for (int s = rank * per_rank; s < (rank + 1) * per_rank; ++s) {
      const int i = r_.at_slot[s], e = r_.expert[i];
      if (!runs_[i] || i == from) continue;
      up_[e] = i;
      const int above = from < 0 ? -1 : least_[r_.expert[from]];
      least_[e] = above >= 0 && share_[above] <= share_[i] ? above : i;
      for (int j = r_.first[e]; j < r_.first[e + 1]; ++j)
        if (runs_[j] && j != i) {
          up_[r_.experts + r_.rank[j]] = j;
          queue_.push_back(r_.rank[j]);
        }
    }
  }
}

void Forest::shift(int entering, int leaving, int root) {
  const double amount = share_[leaving];
  share_[entering] = amount;
  for (int e = r_.expert[entering];;) {
    const int takes = up_[e];
    share_[takes] -= amount;
    const int rank = r_.rank[takes];
    if (rank == root) break;
    const int gives = up_[r_.experts + rank];
    share_[gives] += amount;
    e = r_.expert[gives];
  }
  runs_[leaving] = 0;
  --used_[r_.rank[leaving]];
  runs_[entering] = 1;
  ++used_[root];
}

void Forest::fit(int limit, int attempts) {
  const int per_rank = r_.slots_per_rank();
  std::vector<int32_t> visited(r_.ranks, -1);  // the last attempt that started a replica on this rank
  std::vector<int32_t> rooms;
  for (int k = 0; k < attempts; ++k) {
    rooms.clear();
    for (int r = 0; r < r_.ranks; ++r)
      if (used_[r] < limit) rooms.push_back(r);
    if (*std::max_element(used_.begin(), used_.end()) <= limit) return;
    std::stable_sort(rooms.begin(), rooms.end(), [&](int a, int b) { return visited[a] < visited[b]; });
    // Choose a replica to start so that a rank above the limit stops one. If there is none, move the free
    // room to the rank that had it least recently.
    constexpr int kRelief = -2;
    int entering = -1, leaving = -1, root = -1, oldest = k;
    for (const int room : rooms) {
      span(room);
      for (int s = room * per_rank; s < (room + 1) * per_rank; ++s) {
        const int i = r_.at_slot[s], l = least_[r_.expert[i]];
        if (runs_[i] || l < 0) continue;
        const int at = r_.rank[l];
        const bool relief = used_[at] > limit;
        if (relief ? oldest != kRelief || share_[l] < share_[leaving]
                   : used_[at] == limit && visited[at] < oldest) {
          entering = i, leaving = l, root = room;
          oldest = relief ? kRelief : visited[at];
        }
      }
      if (oldest == kRelief) break;
    }
    if (entering < 0) return;
    if (oldest != kRelief) span(root);
    visited[root] = k;
    shift(entering, leaving, root);
  }
}

}  // namespace moecomm::balance
