// The code of the GIN rail over an emulated network that uses all freedom that GIN's rules allow: dispatch
// and combine over several nodes deliver every bit, and the puts of many groups are ordered before the signal
// that follows them on their stream.
#include <barrier>

#include "device_runner.hpp"

#include "fabric/cuda/gin.cuh"

using namespace world;

namespace {

constexpr int kContexts = 4;

// The DeviceLinks::network of every rank, for one window.
struct Network {
  Network(const std::vector<char*>& bases, const Geometry& any, uint64_t seed, int flags = kGinWindowFlags)
      : gin(any.size, kContexts, seed), window{bases, flags}, of_rank(any.size) {
    for (int r = 0; r < any.size; ++r)
      of_rank[r] = {{r, kContexts, &gin}, &window, {any.nodes(), r / any.ranks_per_node, any.ranks_per_node}};
  }
  std::vector<const void*> all() const {
    std::vector<const void*> pointers;
    for (const GinNetwork& n : of_rank) pointers.push_back(&n);
    return pointers;
  }
  emulated::Gin gin;
  ncclWindow_vidmem window;
  std::vector<GinNetwork> of_rank;
};

// Sets itself up in its first call.
struct GinRunner {
  Status dispatch(World& w, int r, const Case& c, const DispatchWork& work) {
    return at(w, c).dispatch(w, r, c, work);
  }
  Status combine(World& w, int r, const Case& c, const CombineArgs& args) {
    return at(w, c).combine(w, r, c, args);
  }

 private:
  DeviceRunner<GinRail>& at(World& w, const Case& c) {
    std::call_once(once, [&] {
      std::vector<char*> bases;
      for (int r = 0; r < w.size(); ++r)
        bases.push_back(w.rank(r).region.data.get() - w.rank(r).view.node.bytes);
      network = std::make_unique<Network>(bases, w.rank(0).host.geometry, c.nodes);
      runner.network = network->all();
    });
    return runner;
  }
  std::once_flag once;
  std::unique_ptr<Network> network;
  DeviceRunner<GinRail> runner;
};

std::vector<Case> cases() {
  const Case base{
      .nodes = 2, .per_node = 1, .channels = 2, .hidden = 264, .rounds = 3, .workers = 3, .senders = 2};
  std::vector<Case> all;
  Case c = base;
  all.push_back(c);
  c.layout = RowLayout::rank;
  all.push_back(c);
  c = base;
  c.nodes = 3;
  c.check = true;
  all.push_back(c);
  c = base;
  c.chunk_rows = 3;
  c.per_node = 2;
  c.workers = 2;
  c.senders = 1;
  all.push_back(c);
  c = base;
  c.hidden = 1152;
  c.fused = ScaleKind::f32;
  c.wire = Wire::logfmt10;
  all.push_back(c);
  return all;
}

// Four groups of rank 0 put to rank 1, and after a barrier one of them signals. Rank 1 checks the data when
// it sees the signal. Returns how often the data was incomplete.
int incomplete_after_signal(bool one_stream, int rounds, int flags = kGinWindowFlags) {
  constexpr int kGroups = 4, kBytes = 64;
  int incomplete = 0;
  for (int round = 1; round <= rounds; ++round) {
    Heap from(4096), to(4096), shared(4096 * kGroups);
    Network network({from.data.get(), to.data.get()}, Geometry{0, 2, 1}, round, flags);
    DeviceLinks links{.geometry = {0, 2, 1}, .rail_region = from.data.get(), .network = &network.of_rank[0]};
    std::memset(from.data.get(), round, 4096);
    network.gin.hold(true);
    {
      std::barrier latch(kGroups);
      std::vector<std::jthread> groups;
      for (int i = 0; i < kGroups; ++i)
        groups.emplace_back([&, i] {
          auto& scratch = *reinterpret_cast<WarpScratch*>(shared.data.get() + 4096 * i);
          const GinRail rail = GinRail::of(links, one_stream ? 0 : i);
          for (int k = 0; k < 8; ++k)
            rail.put(scratch, 1, 64 + (8 * i + k) * kBytes, from.data.get() + 64 + (8 * i + k) * kBytes,
                     kBytes);
          latch.arrive_and_wait();
          if (i == 0) rail.signal(scratch, 1, 0, 1);
        });
    }
    network.gin.hold(false, true);
    while (ptx::load_acquire_sys(reinterpret_cast<const uint64_t*>(to.data.get())) == 0) {}
    const char* data = to.data.get() + 64;
    incomplete += !std::all_of(data, data + 8 * kGroups * kBytes,
                               [&](char c) { return c == static_cast<char>(round); });
    network.gin.hold(false);
  }
  return incomplete;
}

}  // namespace

TEST_CASES(gin_worlds, cases()) {
  GinRunner runner;
  world::run_case<GinRunner&>(value, runner);
}

TEST(one_signal_after_many_groups) {
  CHECK_EQ(incomplete_after_signal(true, 50), 0);
  CHECK(incomplete_after_signal(false, 50) > 25);                          // without a shared stream
  CHECK(incomplete_after_signal(true, 50, NCCL_WIN_COLL_SYMMETRIC) > 25);  // and strict ordering
}

TEST(a_source_may_be_written_again_after_flush) {
  for (int round = 1; round <= 50; ++round) {
    Heap from(4096), to(4096), shared(4096);
    Network network({from.data.get(), to.data.get()}, Geometry{0, 2, 1}, round);
    const DeviceLinks links{
        .geometry = {0, 2, 1}, .rail_region = from.data.get(), .network = &network.of_rank[0]};
    auto& scratch = *reinterpret_cast<WarpScratch*>(shared.data.get());
    const GinRail rail = GinRail::of(links, round);
    std::memset(from.data.get(), round, 1024);
    for (int k = 0; k < 8; ++k) rail.put(scratch, 1, 128 * k, from.data.get() + 128 * k, 128);
    CHECK(rail.flush(scratch, ~uint64_t{0}).ok());
    std::memset(from.data.get(), -1, 1024);
    CHECK(std::all_of(to.data.get(), to.data.get() + 1024,
                      [&](char c) { return c == static_cast<char>(round); }));
  }
}
