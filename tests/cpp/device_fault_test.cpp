// A failing rank's records, as its kernels leave them and its host reads them.
#include "fabric/cuda/ptx.cuh"  // the emulated one, before anything that includes it

#include <cuda_runtime_api.h>

#include "check.hpp"
#include "fabric/cuda/device.cuh"
#include "runtime/cuda/memory.cpp"

using namespace moecomm;

namespace {

const Status kFull{Code::capacity, Phase::counts, 1, 0, 20, 10},
    kLate{Code::timeout, Phase::arrive, 1, 0, 3, 2};
const Status kOther{Code::mismatch, Phase::announce, 1, 0, 5, 6};

// One of two ranks of a node.
struct Rank {
  uint64_t own[8] = {}, peer[8] = {}, failed[3] = {};
  char* windows[2] = {reinterpret_cast<char*>(own), reinterpret_cast<char*>(peer)};
  FaultRecord faults[kFaultRecords] = {};
  Status broken;
  DeviceLinks links{
      .geometry = {0, 2, 2}, .windows = windows, .region_peers = 1, .failed = failed, .faults = faults};

  void fail(const Status& s) {
    alignas(128) static char shared[warp_shared_bytes(256)];
    char* region[1] = {};
    emulated::run_warp([&] {
      const Warp g;
      WarpScratch* scratch = WarpScratch::open(g, shared, 256);
      if (g.lane() == 0)
        DeviceFabric<LoopbackDeviceRail>{&links, LoopbackDeviceRail{region}, scratch, ~uint64_t{0}}.fail(s);
    });
  }
  void next_call() { std::memset(failed, 0, sizeof(failed)); }
  Status told() { return cuda::take_fault(faults, broken); }
};

}  // namespace

TEST(a_refusal_hides_nothing_that_is_final) {
  Rank r;
  r.fail(kFull);
  CHECK_EQ(r.failed[0], uint64_t{0});  // the call goes on to its end
  r.fail(kLate);
  CHECK_EQ(r.failed[0], uint64_t{1});                // this rank's other warps end
  CHECK_EQ(r.peer[0], pack_fault(kLate, 0).packed);  // and its peer learns of it
  CHECK_EQ(r.told().code, Code::timeout);
  CHECK_EQ(r.told().code, Code::timeout);  // for ever
}

TEST(a_refusal_is_told_once) {
  Rank r;
  r.fail(kFull);
  r.fail(kOther);  // of the same call: the first counts
  CHECK_EQ(r.told().code, Code::capacity);
  CHECK(r.told().ok());
  r.next_call();
  r.fail(kOther);
  CHECK_EQ(r.told().code, Code::mismatch);
}

TEST(a_record_is_not_written_while_the_host_may_read_it) {
  Rank r;
  r.fail(kFull);
  r.next_call();  // queued behind it, before the host has looked
  r.fail(kOther);
  const Status s = r.told();
  CHECK_EQ(s.code, Code::capacity);
  CHECK_EQ(s.expected, kFull.expected);
}

TEST(a_later_call_of_a_broken_rank_ends_too) {
  Rank r;
  r.fail(kLate);
  r.next_call();
  r.fail({Code::lost, Phase::arrive, 1, 0, 0, 0});
  CHECK_EQ(r.failed[0], uint64_t{1});
  CHECK_EQ(r.told().code, Code::timeout);  // the first
}
