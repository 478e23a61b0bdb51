// The decode runtime of the cuda world on a CPU: its calls, the phases that the rules run later, and graphs
// that are captured and replayed. A kernel is one block of two warps, and every lane is a thread.
#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include <cuda_runtime_api.h>

#include "check.hpp"
#include "runtime/cuda/calls.cpp"
#include "runtime/cuda/decode.cpp"
#include "runtime/cuda/kernels/run_group.cuh"
#include "runtime/cuda/memory.cpp"
#include "runtime/cuda/window.cpp"

namespace moecomm::cuda {

const Kernels& loopback_kernels() {
  static const Kernels none{};
  return none;
}

template <class Launch, class Role>
int run_decode(const Launch& launch, void* stream, Role role) {
  as_stream(stream)->enqueue([launch, role] {
    std::vector<std::unique_ptr<char, void (*)(void*)>> shared;
    const int squads = launch.call.spread.warps / launch.squad;
    const size_t bytes = align_up(launch.squad * warp_shared_bytes(launch.call.spread.stage_bytes), 4096);
    for (int i = 0; i < squads; ++i)
      shared.emplace_back(static_cast<char*>(std::aligned_alloc(4096, bytes)), std::free);
    emulated::run_block(launch.call.spread.warps, launch.squad, [&] {
      const int squad = static_cast<int>(threadIdx.x) / 32 / launch.squad;
      const Squad g{squad * launch.squad, launch.squad,
                    reinterpret_cast<WarpScratch*>(shared[squad].get())->words};
      run_as_squad(launch.call, LoopbackDeviceRail{launch.call.links.regions}, g, squad, squads,
                   shared[squad].get(), [&](Squad group, auto fabric, auto barrier, int index) {
                     return role(group, fabric, barrier, launch.work, index, squads);
                   });
    });
  });
  return cudaSuccess;
}

const DomainKernels& loopback_domain_kernels() {
  static const DomainKernels none{};
  return none;
}
const DecodeKernels& loopback_decode_kernels() {
  static const DecodeKernels kernels{
      [] { return static_cast<int>(cudaSuccess); },
      [](const DecodeDispatchLaunch& l, void* stream) {
        return run_decode(l, stream, [](auto... a) { return decode_dispatch_group(a...); });
      },
      [](const DecodeCombineLaunch& l, void* stream) {
        return run_decode(l, stream, [](auto... a) { return decode_combine_group(a...); });
      },
      [](const DecodeCombineLaunch& l, void* stream) {
        return run_decode(l, stream, [](auto... a) { return decode_release_group(a...); });
      }};
  return kernels;
}

}  // namespace moecomm::cuda

using namespace moecomm;

namespace {

constexpr int kSize = 2, kTokens = 2, kHidden = 16;

// One rank. Its experts return their input, so the result of a token is the token times the sum of its
// weights.
struct Rank {
  Rank(int rank, int per_node)
      : decode(
            {rank, kSize, per_node},
            Shape{
                .hidden = kHidden, .dtype = DType::f32, .num_experts = 4, .top_k = 2, .max_tokens = kTokens},
            false, 0, cuda::thread_peer_access(0), std::make_shared<cuda::DeviceCalls>(0),
            cuda::Spread{.sms = 1, .warps = 2, .senders = 0, .stage_bytes = 256}, 60.0) {}

  Status send(bool receive = false) {
    cuda::DeviceDecodeDispatch call;
    call.x = reinterpret_cast<const char*>(x);
    call.ids64 = ids;
    call.tokens = kTokens;
    call.receive = receive;
    call.stream = &stream;
    return decode.dispatch(call);
  }
  void run_experts() {
    const int bank = decode.epoch() & 1;
    stream.enqueue([this, bank] {
      std::memcpy(decode.rows(bank), decode.x(bank), decode.view().packed_rows() * kHidden * 4);
    });
  }
  Status combine(bool receive = true) {
    cuda::DeviceDecodeCombine call;
    call.epoch = decode.epoch();
    call.rows = decode.rows(decode.epoch() & 1);
    call.ids64 = ids;
    call.weights = weights;
    call.y = reinterpret_cast<char*>(y);
    call.receive = receive;
    call.stream = &stream;
    return decode.combine(call);
  }
  void step() {
    CHECK(send().ok());
    CHECK(decode.dispatch_receive(decode.epoch(), &stream).ok());
    run_experts();
    CHECK(combine().ok());
  }
  void fill(int round) {
    for (int i = 0; i < kTokens * kHidden; ++i) x[i] = static_cast<float>(round * 1000 + i);
    std::fill(y, y + kTokens * kHidden, -1.0f);
  }
  void check_sums() {
    for (int i = 0; i < kTokens * kHidden; ++i) CHECK_EQ(y[i], x[i] * 0.5f + x[i] * 0.25f);
  }

  cuda::DeviceDecode decode;
  emulated::Stream stream;
  alignas(16) float x[kTokens * kHidden];  // aligned like a tensor
  alignas(16) float y[kTokens * kHidden];
  float weights[4] = {0.5f, 0.25f, 0.5f, 0.25f};
  int64_t ids[4] = {0, 3, 2, 1};
};

// Runs work(rank) on a thread per rank, with all ranks connected.
template <class Work>
void on_ranks(int per_node, Work work) {
  std::vector<std::unique_ptr<Rank>> ranks;
  std::vector<std::string> contacts;
  for (int r = 0; r < kSize; ++r) {
    ranks.push_back(std::make_unique<Rank>(r, per_node));
    contacts.push_back(ranks[r]->decode.contact());
  }
  for (auto& rank : ranks) rank->decode.connect(contacts);
  std::vector<std::jthread> threads;
  for (auto& rank : ranks) threads.emplace_back([&work, &rank] { work(*rank); });
}

const std::vector<int> kPerNode = {1, 2};

TEST_CASES(three_captured_steps_are_replayed, kPerNode) {
  on_ranks(value, [](Rank& me) {
    me.fill(0);
    me.step();
    me.check_sums();
    me.stream.capture = 7;
    for (int i = 0; i < 3; ++i) me.step();
    const auto graph = me.stream.end_capture();
    for (int round = 1; round <= 5; ++round) {
      me.fill(round);
      for (const auto& work : graph) work();
      me.check_sums();
    }
    me.fill(9);
    me.step();  // and continue without the graph
    me.check_sums();
    CHECK(me.decode.fault().ok());
  });
}

TEST(a_phase_that_is_left_out_is_caught_up_on) {
  on_ranks(2, [](Rank& me) {
    me.fill(1);
    CHECK(me.send().ok());
    CHECK(me.send().ok());  // receives the first one before
    CHECK(me.decode.dispatch_receive(me.decode.epoch(), &me.stream).ok());
    me.run_experts();
    CHECK(me.combine(false).ok());
    CHECK_EQ(me.decode.stage(me.decode.epoch(), &me.stream), DecodeStage::answered);
    CHECK(me.send(true).ok());
    CHECK(me.send(true).ok());  // its places are those of the combine that was not received
    me.check_sums();
    CHECK(me.decode.fault().ok());
  });
}

TEST(a_capture_must_be_whole) {
  on_ranks(2, [](Rank& me) {
    me.fill(2);
    CHECK(me.send().ok());
    const uint64_t sent = me.decode.epoch();
    me.stream.capture = 3;
    const Status refused = me.send();
    CHECK_EQ(refused.code, Code::invalid);
    CHECK_EQ(refused.detail, number(BadInput::wrong_stage));
    CHECK(me.stream.end_capture().empty());
    CHECK(me.decode.dispatch_receive(sent, &me.stream).ok());
    me.stream.capture = 4;
    CHECK(me.send(true).ok());
    CHECK_EQ(me.decode.stage(sent, &me.stream), DecodeStage::idle);  // handles do not cross
    me.stream.end_capture();
    CHECK_EQ(me.decode.stage(me.decode.epoch(), &me.stream), DecodeStage::idle);
    me.step();
    me.check_sums();
  });
}

TEST(a_bad_id_is_told_by_the_next_call) {
  on_ranks(2, [](Rank& me) {
    me.fill(3);
    me.ids[1] = 4;
    CHECK(me.send().ok());
    me.ids[1] = 3;
    const Status told = me.send();
    CHECK_EQ(told.code, Code::invalid);
    CHECK_EQ(told.detail, number(BadInput::id_out_of_range));
    CHECK_EQ(told.got, uint64_t{4});
    me.step();
    me.check_sums();
  });
}

}  // namespace
