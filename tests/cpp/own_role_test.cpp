// The user-defined roles of examples/roles in every world: lanes of a CPU, warps of an emulated GPU over
// memory and over an emulated NCCL network, and fibers of the simulator.
#include "domain_world.hpp"

#include "check.hpp"
#include "exec/fiber.hpp"
#include "fabric/cuda/gin.cuh"
#include "own_roles.hpp"
#include "runtime/sim/domain.hpp"

using namespace world;

namespace {

constexpr uint64_t kHeap = 1 << 20;

// The initial numbers of a rank; every byte of a block is compared.
void fill(char* at, uint64_t bytes, uint64_t what) {
  for (uint64_t i = 0; i < bytes; ++i) at[i] = static_cast<char>((i * 2654435761u + what * 40503u) >> 7);
}
bool holds(const char* at, uint64_t bytes, uint64_t what) {
  std::vector<char> wanted(bytes);
  fill(wanted.data(), bytes, what);
  return std::memcmp(at, wanted.data(), bytes) == 0;
}

// First the blocks of a ring, then the experts, each in a separate block.
struct Sizes {
  uint64_t block = 0, expert = 0;
  int experts = 6, size = 0;
  uint64_t expert_at(int e) const { return size * block + e * expert; }
};

struct HotExperts {
  HotExperts(const DomainView& d, DomainConsumed* consumed, char* heap, const Sizes& sizes) {
    for (int r = 0; r < d.geometry.size; ++r) everyone.push_back(r);
    for (int e = 0; e < sizes.experts; ++e) {
      Rows rows;
      rows.there = d.at.heap.value + sizes.expert_at(e);
      rows.here = e % sizes.size == d.geometry.rank ? heap + sizes.expert_at(e) : nullptr;
      rows.bytes = sizes.expert;
      rows.count = 1;
      segments.push_back(segments_of({rows}, kSlotBytes));
      tokens.push_back(e % 3 * 100);
    }
    for (int e = 0; e < sizes.experts; ++e)
      args.push_back({d,
                      e % sizes.size,
                      {everyone.data(), static_cast<int32_t>(everyone.size())},
                      {segments[e].data(), static_cast<int64_t>(segments[e].size())},
                      consumed});
  }
  own_roles::HotArgs view() const {
    return {args.data(), tokens.data(), static_cast<int32_t>(args.size()), 100};
  }
  std::vector<int32_t> everyone;
  std::vector<std::vector<Segment>> segments;
  std::vector<MulticastArgs> args;
  std::vector<int64_t> tokens;
};

void prepare(char* heap, int rank, const Sizes& sizes, uint64_t round) {
  fill(heap + rank * sizes.block, sizes.block, 100 * round + rank);
  for (int e = rank; e < sizes.experts; e += sizes.size)
    fill(heap + sizes.expert_at(e), sizes.expert, 100 * round + 50 + e);
}

void compare(const char* heap, int rank, const Sizes& sizes, uint64_t round) {
  for (int r = 0; r < sizes.size; ++r) CHECK(holds(heap + r * sizes.block, sizes.block, 100 * round + r));
  for (int e = 0; e < sizes.experts; ++e) {
    const bool is_here = e % 3 > 0 || e % sizes.size == rank;  // cold experts stay with their owner
    CHECK_EQ(holds(heap + sizes.expert_at(e), sizes.expert, 100 * round + 50 + e), is_here);
  }
}

// Runs both roles three times with on(world, role).
template <class On>
void run_world(int size, int per_node, int channels, On&& on) {
  const Sizes sizes{.block = 3 * 512 + 52, .expert = 70'000, .size = size};
  DomainShape shape{kHeap, 1};
  shape.channels = channels;
  DomainWorld w(size, per_node, shape);
  std::vector<std::unique_ptr<HotExperts>> hot;
  for (int r = 0; r < size; ++r)
    hot.push_back(
        std::make_unique<HotExperts>(w.rank(r).view, w.rank(r).consumed.data(), w.rank(r).heap(), sizes));
  for (uint64_t round = 0; round < 3; ++round) {
    for (int r = 0; r < size; ++r) prepare(w.rank(r).heap(), r, sizes, round);
    const auto ring = [&](auto g, auto f, int r, int channel) -> Status {
      DomainRank& me = w.rank(r);
      if (channel > 0) return {};
      return own_roles::ring_gather(
          g, f,
          own_roles::RingArgs{me.view, me.consumed.data(), me.view.at.heap.value, sizes.block, 0, round});
    };
    const auto experts = [&](auto g, auto f, int r, int channel) {
      return own_roles::spread_hot(g, f, hot[r]->view(), channel);
    };
    for (const Status& s : on(w, ring)) CHECK(s.ok());
    for (const Status& s : on(w, experts)) CHECK(s.ok());
    for (int r = 0; r < size; ++r) compare(w.rank(r).heap(), r, sizes, round);
  }
}

struct WorldSize {
  int size, per_node;
};
const std::vector<WorldSize> kWorlds{{1, 1}, {3, 3}, {4, 2}, {3, 1}};

}  // namespace

TEST(on_lanes) {
  for (const WorldSize& s : kWorlds)
    run_world(s.size, s.per_node, 1, [](DomainWorld& w, auto role) { return w.on_lanes(role); });
}

TEST(on_warps_over_memory) {
  for (const WorldSize& s : kWorlds)
    run_world(s.size, s.per_node, 2,
              [](DomainWorld& w, auto role) { return w.on_warps<LoopbackDeviceRail>(role); });
}

TEST(on_warps_over_a_network) {
  for (const WorldSize& s : kWorlds)
    run_world(s.size, s.per_node, 2, [&](DomainWorld& w, auto role) {
      emulated::Gin gin(s.size, 4, 7);
      ncclWindow_vidmem window{w.memories(), kGinWindowFlags};
      std::vector<GinNetwork> of_rank(s.size);
      std::vector<const void*> all;
      for (int r = 0; r < s.size; ++r) {
        of_rank[r] = {{r, 4, &gin}, &window, {s.size, r, 1}};
        all.push_back(&of_rank[r]);
      }
      return w.on_warps<GinRail>(role, all);
    });
}

TEST(on_the_virtual_clock) {
  for (const WorldSize& s : kWorlds) {
    const Sizes sizes{.block = 3 * 512 + 52, .expert = 70'000, .size = s.size};
    SimDomainConfig config;
    config.size = s.size;
    config.ranks_per_node = s.per_node;
    config.heap_bytes = kHeap;
    config.payload = true;
    SimDomain sim(config);
    for (uint64_t seed = 0; seed < 20; ++seed) {
      sim.reset(seed ? Chaos(seed, ~uint64_t{0}) : Chaos{});
      for (int r = 0; r < s.size; ++r) prepare(sim.heap(r), r, sizes, seed);
      const std::vector<Status> all =
          sim.run_role([&](int r, auto f, const DomainView& d, DomainConsumed* consumed) -> Status {
            const HotExperts hot(d, consumed, sim.heap(r), sizes);
            MOE_TRY(own_roles::ring_gather(
                Lane{}, f, own_roles::RingArgs{d, consumed, d.at.heap.value, sizes.block, 0, 0}));
            return own_roles::spread_hot(Lane{}, f, hot.view(), 0);
          });
      for (const Status& status : all) CHECK(status.ok());
      for (int r = 0; r < s.size; ++r) compare(sim.heap(r), r, sizes, seed);
    }
  }
}
