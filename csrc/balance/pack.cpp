#include "balance/pack.hpp"

#include <numeric>

namespace moecomm::balance {
namespace {

// The only free slots are in ranks that hold e already: move a neighbour's replica there and take its place.
// There is one: a full rank without e holds more experts than the other has beside e.
void put_by_moving(Bins& b, std::vector<int>& used, int32_t e, double piece) {
  for (int to = 0; to < b.ranks; ++to) {
    if (used[to] == b.slots) continue;
    for (int from = 0; from < b.ranks; ++from) {
      if (b.holds(from, e)) continue;
      for (int i = 0; i < b.slots; ++i) {
        const size_t at = static_cast<size_t>(from) * b.slots + i;
        if (b.holds(to, b.expert[at])) continue;
        b.put(to, used[to]++, b.expert[at], b.size[at]);
        b.put(from, i, e, piece);
        return;
      }
    }
  }
}

struct Exchange {
  double worst;
  int rank = -1, i = 0, j = 0;
};

// The best swap between ranks h and r: the heavier of the two afterwards.
void best_swap(const Bins& b, int h, int r, Exchange& best) {
  const double *x = b.size.data() + static_cast<size_t>(h) * b.slots, *y = b.size.data() + static_cast<size_t>(r) * b.slots;
  const double high = b.load[h], low = b.load[r];
  for (int i = 0; i < b.slots; ++i) {
    for (int j = 0; j < b.slots; ++j) {
      const double moved = x[i] - y[j];
      const double worst = std::max(high - moved, low + moved);
      if (worst >= best.worst) continue;
      const int32_t mine = b.expert[static_cast<size_t>(h) * b.slots + i], theirs = b.expert[static_cast<size_t>(r) * b.slots + j];
      if (mine == theirs || b.holds(r, mine) || b.holds(h, theirs)) continue;
      best = {worst, r, i, j};
    }
  }
}

}  // namespace

void pack_largest_first(const double* load, const int32_t* count, int experts, Bins& b) {
  std::vector<std::pair<double, int32_t>> order(experts);
  for (int e = 0; e < experts; ++e) order[e] = {-load[e] / count[e], e};
  std::sort(order.begin(), order.end());
  std::vector<int> used(b.ranks, 0);
  std::vector<double> open(b.load);       // a full rank looks infinitely heavy
  std::vector<double> hidden(b.ranks);
  constexpr double kFull = 1e300;
  for (const auto& [negative, e] : order) {
    const double piece = -negative;
    std::vector<int> taken;
    for (int c = 0; c < count[e]; ++c) {
      const int r = static_cast<int>(std::min_element(open.begin(), open.end()) - open.begin());
      if (open[r] >= kFull) {
        put_by_moving(b, used, e, piece);
        continue;
      }
      b.put(r, used[r]++, e, piece);
      open[r] = kFull;                    // not twice the same expert
      taken.push_back(r);
    }
    for (const int r : taken) open[r] = used[r] == b.slots ? kFull : b.load[r];
    if (static_cast<int>(taken.size()) < count[e])
      for (int r = 0; r < b.ranks; ++r) open[r] = used[r] == b.slots ? kFull : b.load[r];
  }
}

void swap_down(Bins& b, double enough) {
  for (;;) {
    const int h = b.heaviest();
    if (b.load[h] <= enough) return;
    Exchange best{b.load[h] * (1 - 1e-9)};
    const int l = b.lightest();
    best_swap(b, h, l, best);
    if (best.worst > enough)
      for (int r = 0; r < b.ranks; ++r)
        if (r != h && r != l) best_swap(b, h, r, best);
    if (best.rank < 0) return;
    b.swap(h, best.i, best.rank, best.j);
  }
}

}  // namespace moecomm::balance
