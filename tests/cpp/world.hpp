// All ranks of a job in one process, for protocol tests. Every rank has a thread, and a node window and a
// rail region in heap memory, so that AddressSanitizer detects every access out of bounds. A rank is one Lane
// or a Team of lanes.
//
// `expected_rows` and `expected_sum` are the oracle: they follow the definition of dispatch and combine token
// by token and share no code with the protocol.
#pragma once
#include <bit>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "base/quantize.hpp"
#include "exec/lane.hpp"
#include "exec/team.hpp"
#include "fabric/cpu/host.hpp"
#include "fabric/cpu/loopback.hpp"
#include "runtime/memory.hpp"
#include "runtime/plan.hpp"
#include "schedule/sequential.hpp"

namespace world {

using namespace moecomm;

struct Heap {
  explicit Heap(uint64_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(4096, bytes)), std::free), bytes(bytes) {
    std::memset(data.get(), 0, bytes);
  }
  std::unique_ptr<char, void (*)(void*)> data;
  uint64_t bytes;
};

struct RankState {
  RankState(const Geometry& g, const Shape& s, bool check)
      : view(make_view(g, s, check)),
        window(view.node.bytes),
        region(view.rail.bytes),
        arena(view.node.arena, view.node.arena + s.arena_bytes, dispatch_bound(g, s)),
        counts(2 * g.nodes() * s.channels) {
    host.geometry = g;
    host.window_faults = view.node.faults;
    host.region_faults = view.rail.faults;
    host.fault_out = view.rail.fault_out;
    for (int n = 0; n < g.nodes(); ++n) host.peer_ranks.push_back(n == g.node() ? -1 : g.rail_rank(n));
    host.own_peer = g.node();
    host.rail_region = region.data.get();
    host.watch = &watch;
    consumed.rows = counts.data();
    consumed.back = counts.data() + g.nodes() * s.channels;
  }
  HostFabric<LoopbackRail> fabric() { return {&host, &loopback}; }
  void begin(double timeout = 60) {
    host.deadline =
        std::chrono::steady_clock::now() + std::chrono::microseconds(static_cast<int64_t>(timeout * 1e6));
  }

  BufferView view;
  Heap window, region;
  Arena arena;
  std::vector<uint64_t> counts;
  HostState host;
  LoopbackRail loopback;
  Watch watch;
  Consumed consumed;
};

class World {
 public:
  World(int nodes, int per_node, const Shape& shape, bool check = false) {
    const int size = nodes * per_node;
    for (int r = 0; r < size; ++r)
      ranks_.push_back(std::make_unique<RankState>(Geometry{r, size, per_node}, shape, check));
    for (auto& rank : ranks_) {
      const Geometry& g = rank->host.geometry;
      for (int l = 0; l < per_node; ++l)
        rank->host.windows[l] = ranks_[g.rank_at(g.node(), l)]->window.data.get();
      std::vector<char*> regions;
      for (int n = 0; n < nodes; ++n) regions.push_back(ranks_[g.rail_rank(n)]->region.data.get());
      rank->loopback.attach(regions);
    }
  }
  int size() const { return static_cast<int>(ranks_.size()); }
  RankState& rank(int r) { return *ranks_[r]; }

  // Runs fn(rank) on one thread per rank.
  template <class Fn>
  void each(Fn&& fn) {
    std::vector<std::jthread> threads;
    for (int r = 0; r < size(); ++r) threads.emplace_back([&fn, r] { fn(r); });
  }

 private:
  std::vector<std::unique_ptr<RankState>> ranks_;
};

// lanes: 0 for a Lane, else the number of threads of a Team.
template <class Role>
Status execute(int lanes, Role&& role) {
  return lanes == 0 ? role(Lane{}) : run_team(lanes, [&](Team t) { return role(t); });
}

// -- values ------------------------------------------------------------------------------------------

inline float bf16_to_float(uint16_t v) { return std::bit_cast<float>(uint32_t{v} << 16); }
inline uint16_t float_to_bf16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float load(const char* row, int64_t i, DType t) {
  if (t == DType::bf16) return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[i]);
  return reinterpret_cast<const float*>(row)[i];
}
inline void store(char* row, int64_t i, DType t, float v) {
  if (t == DType::bf16)
    reinterpret_cast<uint16_t*>(row)[i] = float_to_bf16(v);
  else
    reinterpret_cast<float*>(row)[i] = v;
}
inline float rounded(float v, DType t) { return t == DType::bf16 ? bf16_to_float(float_to_bf16(v)) : v; }

// A value that is unlikely to be the same for another (rank, row, channel).
inline float value_of(uint64_t a, uint64_t b, uint64_t c) {
  uint64_t h = (a * 0x9E3779B97F4A7C15ull) ^ (b * 0xC2B2AE3D27D4EB4Full) ^ (c * 0x165667B19E3779F9ull);
  h = (h ^ h >> 29) * 0xBF58476D1CE4E5B9ull;
  return (static_cast<float>(h >> 40) - 8388608.0f) / 65536.0f;
}

struct Input {
  int tokens = 0;
  std::vector<char> x, scales;
  std::vector<char> arriving, arriving_scales;  // x and scales as receivers get them
  std::vector<int64_t> ids;
  std::vector<float> weights;
};

// -- the oracle -----------------------------------------------------------------------------------------

struct Wanted {  // one row of a receiver; token -1: padding
  int source = -1, token = -1;
  std::vector<int> slots;  // indices of the token's picks that it serves
};

struct Expected {
  std::vector<Wanted> rows;
  std::vector<int64_t> tokens_per_expert, rows_per_expert;
};

inline Expected expected_rows(const std::vector<Input>& in, int rank, int per_rank, int top_k,
                              RowLayout layout, int alignment) {
  Expected e;
  const auto is_mine = [&](int64_t id) { return id >= 0 && id / per_rank == rank; };
  if (layout == RowLayout::rank)
    for (int s = 0; s < static_cast<int>(in.size()); ++s)
      for (int t = 0; t < in[s].tokens; ++t) {
        Wanted w{s, t, {}};
        for (int k = 0; k < top_k; ++k)
          if (is_mine(in[s].ids[t * top_k + k])) w.slots.push_back(k);
        if (!w.slots.empty()) e.rows.push_back(w);
      }
  for (int id = rank * per_rank; id < (rank + 1) * per_rank; ++id) {
    int64_t n = 0;
    for (int s = 0; s < static_cast<int>(in.size()); ++s)
      for (int t = 0; t < in[s].tokens; ++t)
        for (int k = 0; k < top_k; ++k)
          if (in[s].ids[t * top_k + k] == id) {
            ++n;
            if (layout == RowLayout::expert) e.rows.push_back({s, t, {k}});
          }
    e.tokens_per_expert.push_back(n);
    while (n % alignment) {
      ++n;
      if (layout == RowLayout::expert) e.rows.push_back({});
    }
    e.rows_per_expert.push_back(n);
  }
  return e;
}

// y[t] of a source rank: nodes ascending, ranks ascending in a node, rows ascending in a rank. row(rank,
// index, h) is the value of the experts' output, weight(rank, index) its weight. cross(part) applies the wire
// format of the rail to a node's sum.
template <class RowValue, class RowWeight, class Cross>
std::vector<float> expected_sum(const std::vector<Expected>& all, int source, int t, int per_node,
                                const std::vector<float>& bias, RowValue&& row, RowWeight&& weight,
                                Cross&& cross) {
  const size_t hidden = bias.size();
  std::vector<float> total(hidden), part(hidden);
  bool any = false;
  for (int node = 0; node < static_cast<int>(all.size()) / per_node; ++node) {
    bool some = false;
    for (int r = node * per_node; r < (node + 1) * per_node; ++r)
      for (int i = 0; i < static_cast<int>(all[r].rows.size()); ++i) {
        if (all[r].rows[i].source != source || all[r].rows[i].token != t) continue;
        for (size_t h = 0; h < hidden; ++h) {
          const float term = row(r, i, h) * weight(r, i);
          part[h] = some ? part[h] + term : term;
        }
        some = true;
      }
    if (!some) continue;
    if (node != source / per_node) cross(part);
    for (size_t h = 0; h < hidden; ++h) total[h] = any ? total[h] + part[h] : part[h];
    any = true;
  }
  for (size_t h = 0; h < hidden; ++h) total[h] += bias[h];
  return total;
}

// -- quantization, by the scalar definitions ------------------------------------------------------------

// FP8 codes of n elements that share a scale; returns the scale.
inline float scalar_fp8(const float* v, int n, ScaleKind kind, uint8_t* codes) {
  uint32_t amax = 0;
  for (int i = 0; i < n; ++i) amax = std::max(amax, finite_magnitude<uint32_t>(v[i]));
  const auto s = tile_scale<uint32_t>(bits_as<float>(amax), kind);
  for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(e4m3_encode<uint32_t>(v[i] * s.inverse));
  return s.scale;
}

// Replaces n elements of one tile by their values after the rail.
inline void scalar_cross(float* v, int n, Wire wire, DType type) {
  if (wire == Wire::plain) {
    for (int i = 0; i < n; ++i) v[i] = rounded(v[i], type);
  } else if (wire == Wire::fp8) {
    std::vector<uint8_t> codes(n);
    const float scale = scalar_fp8(v, n, ScaleKind::f32, codes.data());
    for (int i = 0; i < n; ++i) v[i] = e4m3_decode<float>(uint32_t{codes[i]}) * scale;
  } else {
    float least = INFINITY, largest = 0.0f;
    for (int i = 0; i < n; ++i) {
      const float m = std::fabs(v[i]);
      if (!std::isnormal(m)) continue;
      least = std::min(least, m);
      largest = std::max(largest, m);
    }
    const LogTile tile = log_tile(least, largest);
    for (int i = 0; i < n; ++i)
      v[i] = log_decode<float>(log_encode<uint32_t>(v[i], tile, tile.step > 0.0f ? 1.0f / tile.step : 0.0f),
                               tile);
  }
}

}  // namespace world
