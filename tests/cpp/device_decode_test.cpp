// Decode with the fabric, squads, barriers and schedule of the cuda world. Every lane is a thread, over an
// emulated copy engine; nodes are connected by stores or by an emulated network. Only the GPU's compiler and
// hardware are not tested.
#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include "decode_rounds.hpp"
#include "fabric/cuda/gin.cuh"
#include "runtime/cuda/kernels/decode_launch.hpp"
#include "runtime/cuda/kernels/run_group.cuh"

using namespace world;

namespace {

// A rank's device state, with one block of c.groups squads of c.squad warps. gin: the network of all ranks.
template <class Rail>
class DeviceDecode {
 public:
  static constexpr uint32_t kStage = 256;

  explicit DeviceDecode(std::shared_ptr<emulated::Gin> gin = nullptr) : gin_(std::move(gin)) {}
  DeviceDecode(const DeviceDecode& other) : gin_(other.gin_) {}  // a copy has its initial state

  DecodeTurn turn(DecodeState&, int) { return {}; }
  Status send(DecodeState& me, const DecodeCase& c, const DecodeSendArgs& a, uint64_t ticket) {
    return dispatch(me, c, {a, memory(me, c), ticket, true, false});
  }
  Status receive(DecodeState& me, const DecodeCase& c, const DecodeReceiveArgs& a) {
    return dispatch(me, c, {make_decode_send_args(a.d, a.turn, {}), memory(me, c), 0, false, true});
  }
  Status answer(DecodeState& me, const DecodeCase& c, const DecodeCombineArgs& a, const Input& in,
                uint64_t ticket) {
    return combine(
        me, c, {a, memory(me, c), ticket, in.ids.data(), nullptr, in.weights.data(), nullptr, true, false});
  }
  Status sum(DecodeState& me, const DecodeCase& c, const DecodeCombineArgs& a, uint64_t ticket) {
    return combine(me, c, {a, memory(me, c), ticket, nullptr, nullptr, nullptr, nullptr, false, true});
  }

 private:
  DecodeMemory memory(DecodeState& me, const DecodeCase& c) {
    apart_.resize(decode_scratch_ints(me.view.geometry, me.view.shape, c.groups));
    return {&clock_, me.tables.data(), me.table_bytes, apart_.data()};
  }
  Status dispatch(DecodeState& me, const DecodeCase& c, const DecodeDispatchWork& work) {
    return each_squad(me, c, [&](Squad g, auto f, auto barrier, int i) {
      return decode_dispatch_group(g, f, barrier, work, i, c.groups);
    });
  }
  Status combine(DecodeState& me, const DecodeCase& c, const DecodeCombineWork& work) {
    return each_squad(me, c, [&](Squad g, auto f, auto barrier, int i) {
      return decode_combine_group(g, f, barrier, work, i, c.groups);
    });
  }
  template <class Role>
  Status each_squad(DecodeState& me, const DecodeCase& c, Role&& role) {
    const Geometry& g = me.view.geometry;
    uint64_t same_device = ~uint64_t{0};
    Counters counters;
    ncclWindow_vidmem window{{}, kGinWindowFlags};  // of every rank: as if it ended with its rail region
    for (int r = 0; r < g.size; ++r)
      window.base.push_back((r == g.rank ? me.region.data.get() : me.regions[r]) - me.view.window.bytes);
    const GinNetwork network{{g.rank, kContexts, gin_.get()}, &window, {g.size, g.rank, 1}};
    moecomm::cuda::Call call;
    call.links = {.geometry = g,
                  .windows = me.host.windows,
                  .rail_region = me.region.data.get(),
                  .regions = me.regions.data(),
                  .network = &network,
                  .region_offset = me.view.window.bytes,
                  .same_device = &same_device,
                  .window_faults = me.view.window.faults,
                  .region_faults = me.view.region.faults,
                  .region_peers = g.size,
                  .own_peer = g.rank,
                  .failed = failed_,
                  .faults = faults_,
                  .counters = &counters};
    call.spread = {.sms = 1, .warps = c.groups * c.squad, .senders = 0, .stage_bytes = kStage};
    call.timeout_ns = 100'000'000'000;
    call.latches = &met_;
    std::vector<Heap> shared;
    for (int i = 0; i < c.groups; ++i)
      shared.emplace_back(align_up(c.squad * warp_shared_bytes(kStage), 4096));  // a piece per warp
    emulated::run_block(c.groups * c.squad, c.squad, [&] {
      const int squad = static_cast<int>(threadIdx.x) / 32 / c.squad;
      char* own = shared[squad].data.get();
      const Squad group{squad * c.squad, c.squad, reinterpret_cast<WarpScratch*>(own)->words};
      moecomm::cuda::run_as_squad(call, Rail::of(call.links, 0), group, squad, c.groups, own, role);
    });
    const FaultRecord& record = faults_[1].code ? faults_[1] : faults_[0];
    return record.code ? record.status : Status{};
  }

  static constexpr int kContexts = 3;
  std::shared_ptr<emulated::Gin> gin_;
  DecodeClock clock_{};
  uint64_t met_ = 0, failed_[3] = {};
  FaultRecord faults_[kFaultRecords] = {};
  std::vector<int32_t> apart_;
};

const std::vector<DecodeCase> kCases = {
    {.nodes = 2, .per_node = 1, .hidden = 520, .epochs = 7, .groups = 2, .captured = 3},  // rows longer than
                                                                                          // some stages
    {.nodes = 1, .per_node = 2, .hidden = 48, .epochs = 4, .groups = 2, .overlap = true},
    {.nodes = 2,
     .per_node = 1,
     .weighted = true,
     .wire = Wire::logfmt10,
     .hidden = 144,
     .epochs = 3,
     .groups = 3},
    {.nodes = 1, .per_node = 2, .check = true, .quantized = true, .hidden = 1168, .epochs = 3, .groups = 2},
    {.nodes = 2,
     .per_node = 1,
     .quantized = true,
     .wire = Wire::fp8,
     .hidden = 656,
     .epochs = 3,
     .groups = 1,
     .squad = 2},  // squads of several warps
};

TEST_CASES(device_decode, kCases) {
  run_decode_case(value, std::vector<DeviceDecode<LoopbackDeviceRail>>(value.nodes * value.per_node));
}

// The puts of all groups to a rank are ordered before the one signal that announces them.
TEST_CASES(gin_decode, kCases) {
  const int size = value.nodes * value.per_node;
  if (value.nodes == 1) return;
  run_decode_case(value,
                  std::vector<DeviceDecode<GinRail>>(
                      size, DeviceDecode<GinRail>(std::make_shared<emulated::Gin>(size, 3, value.hidden))));
}

}  // namespace
