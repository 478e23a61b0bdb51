#include "balance/route.hpp"

#include <algorithm>

namespace moecomm::balance {

Refusal count_picks(const int64_t* ids, int tokens, int top_k, int experts, int32_t* counts) {
  std::fill(counts, counts + experts, 0);
  std::vector<int32_t> seen(experts, -1);  // the last token that picked it
  for (int t = 0; t < tokens; ++t)
    for (int k = 0; k < top_k; ++k) {
      const int64_t id = ids[static_cast<int64_t>(t) * top_k + k];
      if (id == -1) continue;
      if (id < 0 || id >= experts) return {BadInput::id_out_of_range, t, id};
      if (seen[id] == t) return {BadInput::id_twice, t, id};
      seen[id] = t;
      ++counts[id];
    }
  return {};
}

namespace {

// The nodes that a token goes to. A token number per node avoids clearing.
class Visits {
 public:
  explicit Visits(int nodes) : token_(nodes, -1) {}
  void begin(int own_node) { ++now_, add(own_node); }
  void add(int node) { token_[node] = now_; }
  bool has(int node) const { return token_[node] == now_; }

 private:
  std::vector<int64_t> token_;
  int64_t now_ = -1;
};

}  // namespace

void route_by_quota(const Replicas& r, const int64_t* ids, int tokens, int top_k, int own_node,
                    int32_t* quota, int64_t* physical) {
  Visits visits(r.nodes);
  std::vector<int> open;
  for (int t = 0; t < tokens; ++t) {
    const int64_t row = static_cast<int64_t>(t) * top_k;
    visits.begin(own_node);
    open.clear();
    const auto take = [&](int k, int i) {
      --quota[i];
      physical[row + k] = r.slot[i];
      visits.add(r.node(i));
    };
    for (int k = 0; k < top_k; ++k) {
      const int64_t e = ids[row + k];
      physical[row + k] = -1;
      if (e < 0) continue;
      int left = 0, only = -1;
      for (int i = r.first[e]; i < r.first[e + 1]; ++i)
        if (quota[i] > 0) ++left, only = i;
      if (left == 1)
        take(k, only);
      else if (left > 1)
        open.push_back(k);
    }
    for (const int k : open) {
      const int64_t e = ids[row + k];
      int best = -1;
      for (int i = r.first[e]; i < r.first[e + 1]; ++i) {
        if (quota[i] <= 0) continue;
        const bool here = visits.has(r.node(i));
        if (best < 0 || here > visits.has(r.node(best)) ||
            (here == visits.has(r.node(best)) && quota[i] > quota[best]))
          best = i;
      }
      take(k, best);
    }
  }
}

void route_locally(const Replicas& r, const int64_t* ids, int tokens, int top_k, int own_node,
                   const uint8_t* active, int rotation, int64_t* physical) {
  Visits visits(r.nodes);
  std::vector<int32_t> rows(r.ranks, 0), covers(r.nodes);
  std::vector<int> open;
  const auto usable = [&](int i) { return !active || active[i]; };
  for (int t = 0; t < tokens; ++t) {
    const int64_t row = static_cast<int64_t>(t) * top_k;
    visits.begin(own_node);
    const auto in_visited = [&](int64_t e) {
      for (int i = r.first[e]; i < r.first[e + 1]; ++i)
        if (usable(i) && visits.has(r.node(i))) return true;
      return false;
    };
    // First the nodes that cannot be avoided, then the node that serves most of the open picks, and so on.
    open.clear();
    for (int k = 0; k < top_k; ++k) {
      const int64_t e = ids[row + k];
      physical[row + k] = -1;
      if (e < 0) continue;
      int node = -1;
      bool choice = false;
      for (int i = r.first[e]; i < r.first[e + 1]; ++i) {
        if (!usable(i)) continue;
        choice |= node >= 0 && r.node(i) != node;
        node = r.node(i);
      }
      if (node < 0) continue;
      open.push_back(k);
      if (!choice) visits.add(node);
    }
    for (;;) {
      std::fill(covers.begin(), covers.end(), 0);
      for (const int k : open) {
        const int64_t e = ids[row + k];
        if (in_visited(e)) continue;
        int last = -1;
        for (int i = r.first[e]; i < r.first[e + 1]; ++i)
          if (usable(i) && r.node(i) != last) ++covers[last = r.node(i)];
      }
      const auto best = std::max_element(covers.begin(), covers.end());
      if (*best == 0) break;
      visits.add(static_cast<int>(best - covers.begin()));
    }
    for (const int k : open) {
      const int64_t e = ids[row + k];
      int best = -1;
      for (int n = 0; n < r.count(static_cast<int>(e)); ++n) {
        const int i = r.first[e] + static_cast<int>((e + rotation + n) % r.count(static_cast<int>(e)));
        if (usable(i) && visits.has(r.node(i)) && (best < 0 || rows[r.rank[i]] < rows[r.rank[best]]))
          best = i;
      }
      ++rows[r.rank[best]];
      physical[row + k] = r.slot[best];
    }
  }
}

}  // namespace moecomm::balance
